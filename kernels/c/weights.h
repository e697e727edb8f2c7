// Weights, what is multiplied with them, and how sums become outputs.
//
// What is multiplied lies in tiles: for each 16 tokens, and of those for each 32 inputs, 16 rows of 32. Behind the last
// token there is room for a whole tile, with anything in it.
//
// Weights lie in blocks of 32 inputs by 16 outputs, all blocks of the first 16 outputs first. A block is, in
//
//   bfloat16   1,024 bytes, a tile: for each two inputs, 16 outputs of them in pairs
//   8 bits     16 scales and 16 minima (float16), then for each four inputs, 16 outputs of 4 codes, those of the
//              second and third input exchanged
//   4 bits     16 scales and 16 minima (float16), then for each eight inputs, 16 outputs of 4 codes in the same order
//              with those of the four inputs after them in their upper halves
//
// and a coded weight is (scale * code + minimum) / CODED_UNIT * the factor of its output. Exchanged so, words of 16
// bits hold codes of an even input and of the next side by side, as tiles do.

enum { BF16 = 0, INT8 = 1, INT4 = 2 };
static const i64 BLOCK_BYTES[] = {1024, 64 + 512, 64 + 256};
enum { CODED_UNIT = 1 << 16 };  // scale * code + minimum, which is 2^14 at most, is this times what is summed
enum { NEXT = 1024, AFTER = 16384 };  // bytes ahead of what is read once, for the first and the second level of caches
enum { FEW = 8 };               // tokens that are multiplied with codes as they are
enum { MOST_CACHED = 8 };       // tokens whose logits may fit into the caches; those of more are stored past them
enum { NEAR = 256 };            // tokens that are multiplied with all of a task's weights before the next ones
enum { LEAST_OWN = 128 };       // tokens, for which it is worth it to expand weights that other threads expand as well
enum { DEPTH = 20 };            // tiles of inputs at a time: two of weights for each fit into the first level of caches
enum { KEPT_BYTES = 1 << 20 };  // most of a thread's weights in bfloat16: half of the second level

typedef struct {
    i64 format, in, out;
    i64 gated;  // the first half of the outputs are gates of the second: what comes out is silu(gate) * other
    const uint8_t *blocks;
    const bf16 *bias;
    const float *factors;  // of outputs; none of bfloat16
} Weight;

// Where results go: rows of bfloat16 or float32, or tiles as they are multiplied.
enum { ROWS = 0, WIDE_ROWS = 1, TILES = 2 };

typedef struct {
    const Weight *weight;
    const bf16 *x;
    void *out;
    i64 tokens;
    i64 task_tokens, task_pairs, columns;  // tokens and pairs of outputs of a task, and tasks of the same tokens
    int form;
} Product;

// Where the tiles of a token hold 32 of its `size` numbers, the first of which is `at`.
static inline i64 tile_place(i64 token, i64 at, i64 size) {
    return (token / 16 * (size / 32) + at / 32) * 512 + token % 16 * 32;
}

// Outputs are computed in pairs of 16: side by side, or gates and what they are for. The last may be alone.
typedef struct {
    i64 first, second;  // counted in columns of 16 outputs
} Pair;

static Pair pair_at(const Weight *weight, i64 index) {
    const i64 columns = weight->out / 16;
    if (weight->gated) return (Pair){index, index + columns / 2};
    return (Pair){2 * index, MIN(2 * index + 1, columns - 1)};
}

static i64 count_pairs(const Weight *weight) { return (weight->out / 16 + 1) / 2; }

static inline __m512 silu(__m512 x) {
    const __m512 divisor = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
    return _mm512_mul_ps(x, _mm512_rcp14_ps(divisor));  // to 14 bits, of which bfloat16 keeps 8
}

// Sums of up to 32 tokens by 32 outputs, some of which are outputs already.
typedef struct {
    const Product *product;
    const float *sums;
    Pair pair;
    i64 token;
    int rows, done;
} Block;

enum { GATED, WIDE, STREAMED, BOTH, ONE };  // what there is to be stored of a row

static inline __attribute__((always_inline)) void finish_as(Block *block, int until, int kind) {
    const Product *product = block->product;
    const Weight *weight = product->weight;
    const Pair pair = block->pair;
    const i64 width = kind == GATED ? weight->out / 2 : weight->out, at = 16 * pair.first;
    // Rows are side by side, or in tiles of 16.
    const i64 row_size = product->form == TILES ? 32 : width;
    const i64 first =
        product->form == TILES ? tile_place(block->token, at, width) + at % 32 : block->token * width + at;
    __m512 biases[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512 factors[2] = {_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f)};
    if (weight->factors) {
        factors[0] = _mm512_loadu_ps(weight->factors + 16 * pair.first);
        factors[1] = _mm512_loadu_ps(weight->factors + 16 * pair.second);
    }
    if (weight->bias) {
        biases[0] = load_bf16(weight->bias + 16 * pair.first);
        biases[1] = load_bf16(weight->bias + 16 * pair.second);
    }
    for (; block->done < until; block->done++) {
        const float *sums = block->sums + 32 * block->done;
        const i64 place = first + block->done / 16 * (16 * width) + block->done % 16 * row_size;
        const __m512 one = _mm512_fmadd_ps(_mm512_load_ps(sums), factors[0], biases[0]);
        const __m512 other = _mm512_fmadd_ps(_mm512_load_ps(sums + 16), factors[1], biases[1]);
        bf16 *out = (bf16 *)product->out + place;
        if (kind == GATED) {
            store_bf16(out, _mm512_mul_ps(silu(one), other));
        } else if (kind == WIDE) {
            _mm512_storeu_ps((float *)product->out + place, one);
            _mm512_storeu_ps((float *)product->out + place + 16 * (pair.second - pair.first), other);
        } else if (kind == STREAMED) {
            _mm512_stream_ps((float *)product->out + place, one);
            _mm512_stream_ps((float *)product->out + place + 16 * (pair.second - pair.first), other);
        } else if (kind == BOTH) {
            _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(other, one));
        } else {
            store_bf16(out, one);
        }
    }
}

// Makes outputs of some more rows.
static __attribute__((noinline)) void finish(Block *block, int rows) {
    const int until = MIN(block->done + rows, block->rows);
    if (block->done == until) return;
    if (block->product->weight->gated)
        finish_as(block, until, GATED);
    else if (block->product->form == WIDE_ROWS && block->product->tokens <= MOST_CACHED)
        finish_as(block, until, WIDE);
    else if (block->product->form == WIDE_ROWS)
        finish_as(block, until, STREAMED);
    else if (block->pair.second > block->pair.first)
        finish_as(block, until, BOTH);
    else
        finish_as(block, until, ONE);
}

// Inlined by force: to a compiler a function that only prefetches has no effect, and its calls are left out.
static inline __attribute__((always_inline)) void prefetch(const uint8_t *from, i64 bytes) {
    for (i64 i = 0; i < bytes; i += 64) {
        _mm_prefetch((const char *)from + NEXT + i, _MM_HINT_T0);
        _mm_prefetch((const char *)from + AFTER + i, _MM_HINT_T1);
    }
}
