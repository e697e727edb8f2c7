// A decoder's operations in bfloat16 for x86-64 processors with AMX and AVX-512 BF16: what torch does in hundreds of
// small operations a step, in a few. `native.py` builds this file, and says what each function's arguments are.
//
// Names: T tokens of a step, H query heads, K key/value heads, D head size. A tile is 16 rows of 64 bytes. Products are
// summed in float32 in the order of the inner dimension, whatever is computed beside them: a row's result does not
// depend on the others.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;
typedef int64_t i64;

#define ALIGNED __attribute__((aligned(64)))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

// ---- Threads: those of torch, whose pool spins between operations --------------------------------------------------

typedef struct {
    void (*work)(void *job, i64 index, char *memory);
    void *job;
    i64 count, chunk, next;
    size_t bytes;
} Loop;

static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*max_threads)(void);

// Tiles may be configured already by another library, which remembers it: it gets its configuration back.
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} ALIGNED Tiles;

static void configure(const Tiles *tiles) {
    if (tiles->palette)
        __asm__ volatile("ldtilecfg %0" : : "m"(*tiles));
    else
        __asm__ volatile("tilerelease" : : :);
}

// Memory that a thread keeps from one operation to the next.
static __thread char *scratch;
static __thread size_t scratch_size;

static int reserve(size_t size) {
    if (size <= scratch_size) return 1;
    free(scratch);
    scratch = NULL;
    scratch_size = 0;
    if (posix_memalign((void **)&scratch, 64, size)) return 0;
    scratch_size = size;
    return 1;
}

static void take_part(void *shared) {
    Loop *loop = shared;
    Tiles before;
    if (!reserve(loop->bytes)) return;
    __asm__ volatile("sttilecfg %0" : "=m"(before));
    for (;;) {
        const i64 begin = __atomic_fetch_add(&loop->next, loop->chunk, __ATOMIC_RELAXED);
        const i64 end = MIN(begin + loop->chunk, loop->count);
        if (begin >= end) break;
        for (i64 index = begin; index < end; index++) loop->work(loop->job, index, scratch);
    }
    configure(&before);
}

// Calls work(job, 0 .. count - 1, memory), each once, with `bytes` of memory for each thread. 0 if there was not enough.
// A thread takes some that follow each other at a time, and reads memory in its order; a slow one takes fewer.
static int run(void (*work)(void *, i64, char *), void *job, i64 count, i64 parts, size_t bytes) {
    Loop loop = {work, job, count, MAX(1, count / (parts * max_threads())), 0, bytes};
    gomp_parallel(take_part, &loop, count > 1 ? 0 : 1, 0);
    return loop.next >= loop.count;
}

// Asks the system for the use of tiles. 0 if it refuses.
int treadle_begin(void *parallel, void *threads) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    gomp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    max_threads = (int (*)(void))threads;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// ---- Tiles ---------------------------------------------------------------------------------------------------------
// The "memory" that these clobber keeps compilers from moving stores to a tile's memory behind its load.

#define LOAD(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((i64)(stride)) : "memory")
// From the second level of caches, without taking room in the first: for what is not read again soon.
#define LOAD_ONCE(tile, from, stride) \
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((i64)(stride)) : "memory")
#define STORE(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((i64)(stride)) : "memory")
#define CLEAR(tile) __asm__ volatile("tilezero %%tmm" #tile : : :)
#define MULTIPLY_ADD(sum, left, right) \
    __asm__ volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum : : :)

// Sums in tiles 0 and 1 with left tile 4 have `first` rows, sums 2 and 3 with left tile 5 `second`; tiles 6 and 7 are
// right factors.
static void configure_rows(int first, int second) {
    Tiles tiles = {.palette = 1};
    const int rows[8] = {first, first, second, second, first, second, 16, 16};
    for (int tile = 0; tile < 8; tile++) {
        tiles.rows[tile] = (uint8_t)MAX(rows[tile], 1);
        tiles.row_bytes[tile] = 64;
    }
    configure(&tiles);
}

static inline __m512 widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

static inline __m512 load_bf16(const bf16 *from) { return widen(_mm256_loadu_si256((const __m256i *)from)); }

static inline void store_bf16(bf16 *to, __m512 x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

// Two rows of 16 numbers as 16 pairs.
static inline __m512i pairs(__m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// e to the power of x, to 1e-7 of it; 0 far below, and not a number for what is none.
static inline __m512 exponential(__m512 x) {
    const __m512 y = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-126 * 0.6931472f), x), _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(y, whole);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    const __mmask16 far_below = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126 * 0.6931472f), _CMP_LT_OQ);
    return _mm512_mask_blend_ps(far_below, _mm512_scalef_ps(p, whole), _mm512_setzero_ps());
}

// ---- Products ------------------------------------------------------------------------------------------------------
// What is multiplied lies in tiles: for each 16 tokens, and of those for each 32 inputs, 16 rows of 32. Behind the last
// token there is room for a whole tile, with anything in it.
//
// Weights lie in blocks of 32 inputs by 16 outputs, all blocks of the first 16 outputs first. A block is, in
//
//   bfloat16   1,024 bytes, a tile: for each two inputs, 16 outputs of them in pairs
//   8 bits     16 scales and 16 minima (float16), then for each four inputs, 16 outputs of 4 codes
//   4 bits     16 scales and 16 minima (float16), then for each eight inputs, 16 outputs of 4 codes with those of the
//              four inputs after them in their upper halves
//
// and a coded weight is scale * code + minimum. Codes become tiles of bfloat16 while the tiles before them are
// multiplied, and so do sums become outputs: vectors and tiles have units of their own, and none waits for the other.

enum { BF16 = 0, INT8 = 1, INT4 = 2 };
static const i64 BLOCK_BYTES[] = {1024, 64 + 512, 64 + 256};
enum { NEXT = 1024, AFTER = 8192 };  // bytes ahead of what is read once: to the first and the second level of caches
enum { NEAR = 128 };            // tokens that are multiplied with all of a task's weights before the next ones
enum { DEPTH = 20 };            // tiles of inputs at a time: two of weights for each fit into the first level of caches
enum { KEPT_BYTES = 1 << 20 };  // most of a thread's weights in bfloat16: half of the second level

typedef struct {
    i64 format, in, out;
    i64 gated;  // the first half of the outputs are gates of the second: what comes out is silu(gate) * other
    const uint8_t *blocks;
    const bf16 *bias;
} Weight;

// Where results go: rows of bfloat16 or float32, or tiles as they are multiplied.
enum { ROWS = 0, WIDE_ROWS = 1, TILES = 2 };

typedef struct {
    const Weight *weight;
    const bf16 *x;
    void *out;
    i64 tokens, pairs;  // pairs of 16 outputs in a task
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

enum { GATED, WIDE, BOTH, ONE };  // what there is to be stored of a row

static inline __attribute__((always_inline)) void finish_as(Block *block, int until, int kind) {
    const Product *product = block->product;
    const Weight *weight = product->weight;
    const Pair pair = block->pair;
    const i64 width = kind == GATED ? weight->out / 2 : weight->out, at = 16 * pair.first;
    // Rows are side by side, or in tiles of 16.
    const i64 row_size = product->form == TILES ? 32 : width;
    const i64 first = product->form == TILES ? tile_place(block->token, at, width) + at % 32 : block->token * width + at;
    __m512 biases[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (weight->bias) {
        biases[0] = load_bf16(weight->bias + 16 * pair.first);
        biases[1] = load_bf16(weight->bias + 16 * pair.second);
    }
    for (; block->done < until; block->done++) {
        const float *sums = block->sums + 32 * block->done;
        const i64 place = first + block->done / 16 * (16 * width) + block->done % 16 * row_size;
        const __m512 one = _mm512_add_ps(_mm512_load_ps(sums), biases[0]);
        const __m512 other = _mm512_add_ps(_mm512_load_ps(sums + 16), biases[1]);
        bf16 *out = (bf16 *)product->out + place;
        if (kind == GATED) {
            store_bf16(out, _mm512_mul_ps(silu(one), other));
        } else if (kind == WIDE) {
            _mm512_storeu_ps((float *)product->out + place, one);
            _mm512_storeu_ps((float *)product->out + place + 16 * (pair.second - pair.first), other);
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
    else if (block->product->form == WIDE_ROWS)
        finish_as(block, until, WIDE);
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

static inline __attribute__((always_inline)) void expand_block(const uint8_t *block, i64 format, __m512i *tile) {
    const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)block));
    const __m512 minimum = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(block + 32)));
    const __m512 digits = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 8
    for (unsigned four = 0; four < 8; four++) {
        __m512 weights[4];
        if (format == INT4) {
            const __m512i codes = _mm512_loadu_si512(block + 64 + 64 * (four / 2));
#pragma GCC unroll 4
            for (unsigned i = 0; i < 4; i++)  // the permutation reads the lowest four bits of each lane
                weights[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * i + 4 * (four % 2)), digits);
        } else {
            const __m512i codes = _mm512_loadu_si512(block + 64 + 64 * four);
#pragma GCC unroll 4
            for (unsigned i = 0; i < 4; i++)
                weights[i] = _mm512_cvtepi32_ps(
                    _mm512_and_si512(_mm512_srli_epi32(codes, 8 * i), _mm512_set1_epi32(255)));
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) weights[i] = _mm512_fmadd_ps(weights[i], scale, minimum);
        tile[2 * four] = pairs(weights[0], weights[1]);
        tile[2 * four + 1] = pairs(weights[2], weights[3]);
    }
}

// The weights of a pair of columns: tiles that are `stride` apart, and the codes that they are made of.
typedef struct {
    const uint8_t *codes[2];
    uint8_t *tiles[2];
    i64 stride;
} Weights;

static Weights weights_of(const Weight *weight, Pair pair, char *memory) {
    const i64 column = weight->in / 32 * BLOCK_BYTES[weight->format];
    uint8_t *first = (uint8_t *)weight->blocks + pair.first * column;
    uint8_t *second = (uint8_t *)weight->blocks + pair.second * column;
    if (weight->format == BF16) return (Weights){{first, second}, {first, second}, 1024};
    return (Weights){{first, second}, {(uint8_t *)memory, (uint8_t *)memory + 1024}, 2048};
}

static inline __attribute__((always_inline)) void expand(const Weights *weights, i64 step, i64 format) {
    for (int i = 0; i < 2; i++) {
        const uint8_t *block = weights->codes[i] + step * BLOCK_BYTES[format];
        prefetch(block, BLOCK_BYTES[format]);
        expand_block(block, format, (__m512i *)(weights->tiles[i] + step * weights->stride));
    }
}

// Adds the products of up to 16 tokens, or of 16 `more`, with some inputs to the sums in tiles 0 to 3. Weights in a
// format of codes are expanded on the way, and the block before becomes outputs.
static inline __attribute__((always_inline)) void multiply(const bf16 *x, const bf16 *more, const Weights *weights,
                                                           i64 begin, i64 end, i64 format, Block *before) {
    const int rows = (int)((before->rows + end - begin - 1) / (end - begin));
    if (format != BF16) expand(weights, begin, format);
    for (i64 step = begin; step < end; step++) {
        if (format != BF16 && step + 1 < end) expand(weights, step + 1, format);
        LOAD(6, weights->tiles[0] + step * weights->stride, 64);
        LOAD_ONCE(4, x + 512 * step, 64);
        MULTIPLY_ADD(0, 4, 6);
        LOAD(7, weights->tiles[1] + step * weights->stride, 64);
        MULTIPLY_ADD(1, 4, 7);
        if (more) {
            LOAD_ONCE(5, more + 512 * step, 64);
            MULTIPLY_ADD(2, 5, 6);
            MULTIPLY_ADD(3, 5, 7);
        }
        finish(before, rows);
    }
}

static inline __attribute__((always_inline)) void multiply_as(const bf16 *x, const bf16 *more, const Weights *weights,
                                                              i64 begin, i64 end, i64 format, Block *before) {
    if (format == INT4)
        multiply(x, more, weights, begin, end, INT4, before);
    else if (format == INT8)
        multiply(x, more, weights, begin, end, INT8, before);
    else
        multiply(x, more, weights, begin, end, BF16, before);
}

static void product_task(void *job, i64 index, char *memory) {
    const Product *product = job;
    const Weight *weight = product->weight;
    const i64 tokens = product->tokens, steps = weight->in / 32, parts = (steps + DEPTH - 1) / DEPTH;
    const i64 begin = product->pairs * index, end = MIN(begin + product->pairs, count_pairs(weight));
    float *sums = (float *)memory;
    memory += NEAR * 32 * sizeof(float);
    Block before = {0};
    configure_rows((int)MIN(tokens, 16), (int)MIN(tokens, 32) - 16);
    for (i64 near = 0; near < tokens; near += NEAR) {
        for (i64 i = begin; i < end; i++) {
            const Pair pair = pair_at(weight, i);
            const Weights weights = weights_of(weight, pair, memory + (tokens > NEAR ? (i - begin) * 64 * weight->in : 0));
            for (i64 part = 0; part < parts; part++) {
                for (i64 token = near; token < MIN(tokens, near + NEAR); token += 32) {
                    const bf16 *x = product->x + token * weight->in;
                    const int rows = (int)MIN(32, tokens - token);
                    float *block = sums + (parts > 1 ? (token - near) * 32 : 0);
                    if (part) {
                        LOAD(0, block, 128);
                        LOAD(1, block + 16, 128);
                        if (rows > 16) {
                            LOAD(2, block + 16 * 32, 128);
                            LOAD(3, block + 16 * 32 + 16, 128);
                        }
                    } else {
                        CLEAR(0);
                        CLEAR(1);
                        CLEAR(2);
                        CLEAR(3);
                    }
                    multiply_as(x, rows > 16 ? x + 16 * weight->in : NULL, &weights, steps * part / parts,
                                steps * (part + 1) / parts, token ? BF16 : weight->format, &before);
                    STORE(0, block, 128);
                    STORE(1, block + 16, 128);
                    if (rows > 16) {
                        STORE(2, block + 16 * 32, 128);
                        STORE(3, block + 16 * 32 + 16, 128);
                    }
                    if (part + 1 == parts) before = (Block){product, block, pair, token, rows, 0};
                }
            }
        }
    }
    finish(&before, 32);
}

// A few tokens: codes times inputs in 16 bits, exactly. 16 bits of what is greatest in 32 inputs are more than the 8 of
// bfloat16, and products of bytes are the fastest: each input is 256 * high + low.

enum { FEW = 8 };

typedef struct {
    int8_t high[32], low[32];
} Digits;

typedef struct {
    Product product;
    const Digits *digits;  // [tokens, in / 32]
    const float *units;    // the same: what 1 stands for
    const float *totals;   // the same: the sum of the inputs
} FewTokens;

static void to_digits(const bf16 *x, Digits *digits, float *unit, float *total) {
    __m512 value[2] = {load_bf16(x), load_bf16(x + 16)};
    const float greatest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(value[0]), _mm512_abs_ps(value[1])));
    const __m512 factor = _mm512_set1_ps(greatest > 0 ? 32512.0f / greatest : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < 2; i++) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(value[i], factor));
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
        const __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8));
        _mm_storeu_si128((__m128i *)(digits->high + 16 * i), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128((__m128i *)(digits->low + 16 * i), _mm512_cvtepi32_epi8(low));
        sum = _mm512_add_epi32(sum, whole);
    }
    // What is not finite makes the unit, and with it the result, not a number.
    const __m512 sound = _mm512_mul_ps(_mm512_add_ps(value[0], value[1]), _mm512_setzero_ps());
    *unit = greatest / 32512.0f + _mm512_reduce_add_ps(sound);
    *total = *unit * (float)_mm512_reduce_add_epi32(sum);
}

static inline __attribute__((always_inline)) void column_of_few(const FewTokens *few, i64 column, i64 format,
                                                                int rows, __m512 *sums) {
    const i64 steps = few->product.weight->in / 32, size = BLOCK_BYTES[format];
    const uint8_t *block = few->product.weight->blocks + column * steps * size;
    const __m512i low_half = _mm512_set1_epi8(15);
    for (int row = 0; row < rows; row++) sums[row] = _mm512_setzero_ps();
    for (i64 step = 0; step < steps; step++, block += size) {
        __m512i high[FEW], low[FEW];
        prefetch(block, size);
        for (int row = 0; row < rows; row++) high[row] = low[row] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int four = 0; four < 8; four++) {
            __m512i codes = _mm512_loadu_si512(block + 64 + 64 * (format == INT4 ? four / 2 : four));
            if (format == INT4)
                codes = _mm512_and_si512(four % 2 ? _mm512_srli_epi16(codes, 4) : codes, low_half);
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++) {
                const Digits *digits = few->digits + row * steps + step;
                int32_t four_high, four_low;
                memcpy(&four_high, digits->high + 4 * four, 4);
                memcpy(&four_low, digits->low + 4 * four, 4);
                high[row] = _mm512_dpbusd_epi32(high[row], codes, _mm512_set1_epi32(four_high));
                low[row] = _mm512_dpbusd_epi32(low[row], codes, _mm512_set1_epi32(four_low));
            }
        }
        const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)block));
        const __m512 minimum = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(block + 32)));
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(high[row], 8), low[row]);
            const __m512 unit = _mm512_set1_ps(few->units[row * steps + step]);
            sums[row] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(both), unit), scale, sums[row]);
            sums[row] = _mm512_fmadd_ps(_mm512_set1_ps(few->totals[row * steps + step]), minimum, sums[row]);
        }
    }
}

static inline __attribute__((always_inline)) void pair_of_few(const FewTokens *few, i64 index, i64 format, int rows) {
    const Pair pair = pair_at(few->product.weight, index);
    __m512 first[FEW], second[FEW];
    float ALIGNED sums[32 * FEW];
    column_of_few(few, pair.first, format, rows, first);
    column_of_few(few, pair.second, format, rows, second);
    for (int row = 0; row < rows; row++) {
        _mm512_store_ps(sums + 32 * row, first[row]);
        _mm512_store_ps(sums + 32 * row + 16, second[row]);
    }
    Block block = {&few->product, sums, pair, 0, rows, 0};
    finish(&block, rows);
}

static inline __attribute__((always_inline)) void pair_of(const FewTokens *few, i64 index, i64 format) {
    switch (few->product.tokens) {
        case 1: pair_of_few(few, index, format, 1); break;
        case 2: pair_of_few(few, index, format, 2); break;
        case 3: pair_of_few(few, index, format, 3); break;
        case 4: pair_of_few(few, index, format, 4); break;
        case 5: pair_of_few(few, index, format, 5); break;
        case 6: pair_of_few(few, index, format, 6); break;
        case 7: pair_of_few(few, index, format, 7); break;
        case 8: pair_of_few(few, index, format, 8); break;
    }
}

static void few_tokens(void *job, i64 index, char *memory) {
    (void)memory;
    const FewTokens *few = job;
    if (few->product.weight->format == INT4)
        pair_of(few, index, INT4);
    else
        pair_of(few, index, INT8);
}

static int multiply_few(Product product) {
    const i64 in = product.weight->in, groups = product.tokens * (in / 32);
    if (!reserve((size_t)groups * (sizeof(Digits) + 2 * sizeof(float)))) return 0;
    // No thread's scratch is moved while they read this one: they are given no bytes more.
    Digits *digits = (Digits *)scratch, *next = digits;
    float *units = (float *)(digits + groups), *totals = units + groups;
    for (i64 token = 0; token < product.tokens; token++)
        for (i64 at = 0; at < in; at += 32, next++)
            to_digits(product.x + tile_place(token, at, in), next, units + (next - digits), totals + (next - digits));
    FewTokens few = {product, digits, units, totals};
    return run(few_tokens, &few, count_pairs(product.weight), 2, 0);
}

// The product of tiles with a weight.
static int multiply_tiles(const Weight *weight, const bf16 *x, void *out, i64 tokens, int form) {
    if (weight->format != BF16 && tokens <= FEW) return multiply_few((Product){weight, x, out, tokens, 1, form});
    const i64 pairs = count_pairs(weight), bytes = weight->format == BF16 ? 0 : 64 * weight->in;
    const i64 together = MAX(1, MIN(pairs / (4 * max_threads()), KEPT_BYTES / (64 * weight->in)));
    Product product = {weight, x, out, tokens, together, form};
    return run(product_task, &product, (pairs + together - 1) / together, 8,
               (size_t)(NEAR * 32 * 4 + bytes * (tokens > NEAR ? together : 1)));
}

int treadle_linear(const Weight *weight, const bf16 *x, void *out, i64 tokens, int wide) {
    bf16 *tiles = aligned_alloc(64, (size_t)((tokens + 15) / 16 * 32 * weight->in));
    if (!tiles) return 0;
    for (i64 token = 0; token < tokens; token++)
        for (i64 at = 0; at < weight->in; at += 32)
            memcpy(tiles + tile_place(token, at, weight->in), x + token * weight->in + at, 64);
    const int ok = multiply_tiles(weight, tiles, out, tokens, wide ? WIDE_ROWS : ROWS);
    free(tiles);
    return ok;
}

// ---- What stands between products ----------------------------------------------------------------------------------

enum { LEAST_SHARED = 1 << 13 };  // numbers, for which it is worth it to wake another thread

typedef struct {
    const bf16 *x, *weight;
    bf16 *total, *out;
    i64 tokens, size;
    float eps;
    int form;
} Norm;

static float inverse_rms(const bf16 *x, i64 size, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (i64 i = 0; i < size; i += 16) {
        const __m512 value = load_bf16(x + i);
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)size + eps);
}

static void scale_by(const bf16 *x, float factor, const bf16 *weight, i64 size, bf16 *out) {
    const __m512 wide = _mm512_set1_ps(factor);
    for (i64 i = 0; i < size; i += 16)
        store_bf16(out + i, _mm512_mul_ps(_mm512_mul_ps(load_bf16(x + i), wide), load_bf16(weight + i)));
}

static void norm_token(void *job, i64 token, char *memory) {
    (void)memory;
    const Norm *norm = job;
    const i64 size = norm->size;
    const bf16 *x = norm->x + token * size;
    if (norm->total) {
        bf16 *total = norm->total + token * size;
        for (i64 i = 0; i < size; i += 16)
            store_bf16(total + i, _mm512_add_ps(load_bf16(x + i), load_bf16(total + i)));
        x = total;
    }
    const float factor = inverse_rms(x, size, norm->eps);
    if (norm->form == ROWS) {
        scale_by(x, factor, norm->weight, size, norm->out + token * size);
        return;
    }
    for (i64 i = 0; i < size; i += 32)
        scale_by(x + i, factor, norm->weight + i, 32, norm->out + tile_place(token, i, size));
}

static int normalize(const bf16 *x, bf16 *total, const bf16 *weight, bf16 *out, i64 tokens, i64 size, float eps,
                     int form) {
    Norm norm = {x, weight, total, out, tokens, size, eps, form};
    if (tokens * size < LEAST_SHARED) {
        for (i64 token = 0; token < tokens; token++) norm_token(&norm, token, NULL);
        return 1;
    }
    return run(norm_token, &norm, tokens, 4, 0);
}

// The norm of x + total, where total becomes that sum; of x if there is no total.
int treadle_norm(const bf16 *x, bf16 *total, const bf16 *weight, bf16 *out, i64 tokens, i64 size, float eps) {
    return normalize(x, total, weight, out, tokens, size, eps, ROWS);
}

typedef struct {
    const bf16 *qkv, *q_norm, *k_norm, *cos, *sin;
    bf16 *queries, *keys, *values;
    const i64 *places;
    i64 heads, kv_heads, size;
    float eps;
} Heads;

static void turn_head(const Heads *job, const bf16 *head, const bf16 *weight, i64 token, bf16 *out) {
    const i64 size = job->size, half = size / 2;
    const bf16 *cos = job->cos + token * size, *sin = job->sin + token * size;
    bf16 ALIGNED normed[512];
    if (weight) {
        scale_by(head, inverse_rms(head, size, job->eps), weight, size, normed);
        head = normed;
    }
    for (i64 i = 0; i < half; i += 16) {
        const __m512 low = load_bf16(head + i), high = load_bf16(head + half + i);
        const __m512 turned = _mm512_mul_ps(low, load_bf16(cos + i));
        store_bf16(out + i, _mm512_fnmadd_ps(high, load_bf16(sin + i), turned));
        const __m512 other = _mm512_mul_ps(high, load_bf16(cos + half + i));
        store_bf16(out + half + i, _mm512_fmadd_ps(low, load_bf16(sin + half + i), other));
    }
}

static void heads_of_token(void *shared, i64 token, char *memory) {
    (void)memory;
    const Heads *job = shared;
    const i64 size = job->size, row = job->kv_heads * size;
    const bf16 *qkv = job->qkv + token * (job->heads * size + 2 * row);
    for (i64 head = 0; head < job->heads; head++)
        turn_head(job, qkv + head * size, job->q_norm, token, job->queries + (token * job->heads + head) * size);
    const i64 place = job->places[token];
    if (place < 0) return;
    qkv += job->heads * size;
    for (i64 head = 0; head < job->kv_heads; head++)
        turn_head(job, qkv + head * size, job->k_norm, token, job->keys + place * row + head * size);
    memcpy(job->values + place * row, qkv + row, (size_t)row * sizeof(bf16));
}

int treadle_norm_rope_write(const bf16 *qkv, const bf16 *q_norm, const bf16 *k_norm, float eps, const bf16 *cos,
                            const bf16 *sin, bf16 *keys, bf16 *values, const i64 *places, bf16 *queries, i64 tokens,
                            i64 heads, i64 kv_heads, i64 size) {
    Heads job = {qkv, q_norm, k_norm, cos, sin, queries, keys, values, places, heads, kv_heads, size, eps};
    if (tokens * (heads + 2 * kv_heads) * size < LEAST_SHARED) {
        for (i64 token = 0; token < tokens; token++) heads_of_token(&job, token, NULL);
        return 1;
    }
    return run(heads_of_token, &job, tokens, 4, 0);
}

// ---- Attention -----------------------------------------------------------------------------------------------------
// One task: the queries of some tokens against a context that is read from its pages 64 tokens at a time. For each
// query there are a score near the greatest so far, the sum of weights relative to it, and the weighted sum of values
// (online softmax, Milakov and Gimelshein 2018). Tokens of several calls whose contexts begin alike are one task: they
// go through that beginning together, then each through its own rest.
//
// 16 queries are a unit, and what belongs to one of them is in a lane of its own: softmax needs no maximum and no sum
// across lanes. A unit may hold queries of several key/value heads:
// for each of these there is a factor in which the other heads' queries are zero, and the scores are the sum.
//
//   scores [tokens, lanes] = keys [tokens, D] x queries [D, lanes], for each head
//   sums   [lanes, D]     += weights [lanes, tokens] x values [tokens, D], for each head

enum { SPAN = 64, LANES = 16, MOST_TOGETHER = 8 };

typedef struct {
    const i64 *page_table;
    i64 pages_per_slot, page_size, heads, kv_heads, size, window;
    const int32_t *runs, *tasks;
    i64 num_tasks;
} Contexts;

typedef struct {
    const bf16 *q, *keys, *values;
    bf16 *out;
    const Contexts *contexts;
    i64 together;  // key/value heads of a task
    int form;
} Attention;

// A run of tokens of one call: its first token in the step, how many, its slot, and the position of the first.
enum { RUN_TOKEN, RUN_COUNT, RUN_SLOT, RUN_POSITION, RUN_FIELDS };
// A task: its first run, how many, and the tokens that their contexts share.
enum { TASK_RUN, TASK_COUNT, TASK_SHARED, TASK_FIELDS };

// A row is a query: those of the first head in the order of tokens, then those of the next. Behind the last there may be
// lanes without one.
typedef struct {
    const Attention *job;
    i64 head;            // the first
    i64 each, rows;      // rows of a head, and of all
    i64 most;            // heads in a unit, at most
    int32_t *tokens;     // [lanes] in the step
    int32_t *positions;  // the same
    int32_t *runs;       // the same: which of the task's; -1 for lanes without a row
    float *best;         // the same
    float *weights;      // the same
    bf16 *q;             // [units, most, D / 32] tiles: of each two numbers of a head, 16 queries in pairs
    float *sums;         // [units, most, D / 16] tiles: 16 lanes
    bf16 *keys;          // [heads, SPAN / 16, D / 32] tiles: 16 tokens
    bf16 *values;        // [heads, SPAN / 32, D / 16] tiles: of each two tokens, 16 numbers in pairs
    float *scores;       // two units of [SPAN, LANES]
    bf16 *shares;        // [SPAN / 32] tiles: 16 lanes
} Queries;

static size_t lay_out(Queries *queries, char *memory, i64 each, i64 heads, i64 size) {
    size_t at = 0;
    const i64 rows = each * heads, lanes = (rows + LANES - 1) / LANES * LANES;
    queries->each = each;
    queries->rows = rows;
    queries->most = MIN(heads, (LANES - 2) / each + 2);
    const i64 numbers = lanes * queries->most * size;
#define PLACE(field, bytes) queries->field = (void *)(memory + at), at += ((size_t)(bytes) + 63) / 64 * 64
    PLACE(tokens, lanes * 4);
    PLACE(positions, lanes * 4);
    PLACE(runs, lanes * 4);
    PLACE(best, lanes * 4);
    PLACE(weights, lanes * 4);
    PLACE(q, numbers * 2);
    PLACE(sums, numbers * 4);
    PLACE(keys, heads * SPAN * size * 2);
    PLACE(values, heads * SPAN * size * 2);
    PLACE(scores, 2 * SPAN * LANES * 4);
    PLACE(shares, SPAN * LANES * 2);
#undef PLACE
    return at;
}

static i64 first_head(const Queries *queries, i64 unit) { return unit * LANES / queries->each; }

static i64 last_head(const Queries *queries, i64 unit) {
    return (MIN((unit + 1) * LANES, queries->rows) - 1) / queries->each;
}

static bf16 *q_of(const Queries *queries, i64 unit, i64 head) {
    return queries->q + (unit * queries->most + head - first_head(queries, unit)) * queries->job->contexts->size * LANES;
}

static float *sums_of(const Queries *queries, i64 unit, i64 head) {
    return queries->sums +
           (unit * queries->most + head - first_head(queries, unit)) * queries->job->contexts->size * LANES;
}

// 16 rows of 16 doublewords, rows becoming columns.
static void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// Where the first head's keys and values of each token of a span begin; those behind the last are at -1.
typedef struct {
    i64 at[SPAN];
} Places;

static void find_places(const Attention *job, i64 head, i64 slot, i64 from, i64 to, Places *places) {
    const Contexts *contexts = job->contexts;
    const i64 row = contexts->kv_heads * contexts->size, *pages = contexts->page_table + slot * contexts->pages_per_slot;
    i64 page = from / contexts->page_size, left = contexts->page_size - from % contexts->page_size, at = 0;
    if (from < to) at = ((pages[page] + 1) * contexts->page_size - left) * row + head * contexts->size;
    for (i64 i = 0; i < SPAN; i++, at += row, left--) {
        if (from + i >= to) {
            places->at[i] = -1;
            continue;
        }
        if (!left) {
            at = pages[++page] * contexts->page_size * row + head * contexts->size;
            left = contexts->page_size;
        }
        places->at[i] = at;
    }
}

static inline __m512i row_at(const bf16 *rows, i64 place) {
    return place < 0 ? _mm512_setzero_si512() : _mm512_loadu_si512(rows + place);
}

// Brings keys and values of a span into tiles, those behind the last token as zeros. Memory is asked for the next span.
static void fetch(const Queries *queries, const Places *places, const Places *next, i64 tokens) {
    const Attention *job = queries->job;
    const i64 size = job->contexts->size;
    for (i64 token = 0; token < tokens; token += 2) {
        const i64 even = places->at[token], odd = places->at[token + 1];
        bf16 *key = queries->keys + token / 16 * size * 16 + token % 16 * 32;
        bf16 *value = queries->values + token / 32 * size * 32 + token % 32 * 16;
        for (i64 head = 0; head < job->together; head++, key += (SPAN - 16) * size, value += (SPAN - 32) * size)
            for (i64 at = head * size; at < (head + 1) * size; at += 32, key += 512, value += 1024) {
                _mm512_store_si512(key, row_at(job->keys + at, even));
                _mm512_store_si512(key + 32, row_at(job->keys + at, odd));
                const __m512i first = row_at(job->values + at, even), second = row_at(job->values + at, odd);
                _mm512_store_si512(value, _mm512_unpacklo_epi16(first, second));
                _mm512_store_si512(value + 512, _mm512_unpackhi_epi16(first, second));
                for (i64 i = token; i < token + 2; i++) {
                    if (next->at[i] < 0) continue;
                    _mm_prefetch((const char *)(job->keys + next->at[i] + at), _MM_HINT_T1);
                    _mm_prefetch((const char *)(job->values + next->at[i] + at), _MM_HINT_T1);
                }
            }
    }
}

// Scores of the keys of a span with a unit.
static void score(const Queries *queries, i64 unit, i64 tokens, float *scores) {
    const i64 size = queries->job->contexts->size, tile = 16 * size;
    for (i64 token = 0; token < tokens; token += 64, scores += 64 * LANES) {
        CLEAR(0);
        CLEAR(1);
        CLEAR(2);
        CLEAR(3);
        for (i64 head = first_head(queries, unit); head <= last_head(queries, unit); head++) {
            const bf16 *q = q_of(queries, unit, head), *keys = queries->keys + (head * SPAN + token) * size;
            for (i64 part = 0; part < size / 32; part++, q += 512, keys += 512) {
                LOAD(4, q, 64);
                LOAD(5, keys, 64);
                MULTIPLY_ADD(0, 5, 4);
                LOAD(6, keys + tile, 64);
                MULTIPLY_ADD(1, 6, 4);
                LOAD(5, keys + 2 * tile, 64);
                MULTIPLY_ADD(2, 5, 4);
                LOAD(6, keys + 3 * tile, 64);
                MULTIPLY_ADD(3, 6, 4);
            }
        }
        STORE(0, scores, 64);
        STORE(1, scores + 256, 64);
        STORE(2, scores + 512, 64);
        STORE(3, scores + 768, 64);
    }
}

// Two to the power of x, to 1e-4 of it, which is a twentieth of what rounding to bfloat16 does. What is below -126
// counts as that.
static inline __m512 power_of_two(__m512 x) {
    const __m512 shift = _mm512_set1_ps(12582912.0f);  // behind which there are only whole numbers
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    const __m512 whole = _mm512_add_ps(x, shift), f = _mm512_sub_ps(x, _mm512_sub_ps(whole, shift));
    __m512 p = _mm512_set1_ps(5.500893e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.422110e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.932829e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(whole), 23)));
}

// The tokens of a span that the lanes of a unit see, counted from its begin: none where the last is before the first.
typedef struct {
    __m512i first, last;
} Sight;

// Of the tokens `from` to `to`. What a run looks at is hidden from the rows of others; -1 stands for all runs.
static Sight sight_of(const Queries *queries, i64 unit, i64 run, i64 from, i64 to) {
    const i64 window = queries->job->contexts->window;
    const __m512i runs = _mm512_load_si512(queries->runs + LANES * unit), none = _mm512_set1_epi32(-1);
    const __m512i position = _mm512_sub_epi32(_mm512_load_si512(queries->positions + LANES * unit), _mm512_set1_epi32((int)from));
    const __mmask16 idle = run < 0 ? 0 : _mm512_cmpneq_epi32_mask(runs, _mm512_set1_epi32((int)run)) &
                                             _mm512_cmpneq_epi32_mask(runs, none);
    const __m512i last = _mm512_min_epi32(position, _mm512_set1_epi32((int)(to - from - 1)));
    return (Sight){
        window ? _mm512_sub_epi32(position, _mm512_set1_epi32((int)window - 1)) : _mm512_setzero_si512(),
        _mm512_mask_mov_epi32(last, idle, none),
    };
}

static inline __mmask16 sees(Sight sight, i64 token) {
    const __m512i index = _mm512_set1_epi32((int)token);
    return _mm512_cmple_epi32_mask(index, sight.last) & _mm512_cmpge_epi32_mask(index, sight.first);
}

static inline int sees_all(Sight sight, i64 from, i64 to) {
    return (_mm512_cmplt_epi32_mask(sight.last, _mm512_set1_epi32((int)to - 1)) |
            _mm512_cmpgt_epi32_mask(sight.first, _mm512_set1_epi32((int)from))) == 0;
}

static inline int sees_any(Sight sight) {
    return (_mm512_cmpge_epi32_mask(sight.last, _mm512_setzero_si512()) &
            _mm512_cmplt_epi32_mask(sight.first, _mm512_set1_epi32(SPAN))) != 0;
}

// Raises the best scores of some lanes, and makes what they have so far relative to them.
static __m512 raise(const Queries *queries, i64 unit, __mmask16 lanes, __m512 best, __m512 raised) {
    float ALIGNED shrink[LANES];
    const __m512 factor = power_of_two(_mm512_sub_ps(best, raised));
    _mm512_store_ps(shrink, factor);
    for (i64 head = first_head(queries, unit); head <= last_head(queries, unit); head++) {
        float *sums = sums_of(queries, unit, head);
        for (i64 lane = 0; lane < LANES; lane++) {
            if (!(lanes >> lane & 1)) continue;
            for (i64 d = 0; d < queries->job->contexts->size; d += 16) {
                float *part = sums + d * LANES + lane * 16;
                _mm512_store_ps(part, _mm512_mul_ps(_mm512_load_ps(part), _mm512_set1_ps(shrink[lane])));
            }
        }
    }
    float *weights = queries->weights + LANES * unit;
    _mm512_store_ps(weights, _mm512_mul_ps(_mm512_load_ps(weights), factor));
    _mm512_store_ps(queries->best + LANES * unit, raised);
    return raised;
}

// The greatest scores of 32 tokens.
static inline __attribute__((always_inline)) __m512 greatest_of(const float *scores, i64 token, Sight sight, int hidden) {
    __m512 most[4];
    for (int i = 0; i < 4; i++) most[i] = _mm512_set1_ps(-INFINITY);
    for (i64 i = 0; i < 32; i++) {
        const __m512 score = _mm512_load_ps(scores + LANES * i);
        most[i % 4] = hidden ? _mm512_mask_max_ps(most[i % 4], sees(sight, token + i), most[i % 4], score)
                             : _mm512_max_ps(most[i % 4], score);
    }
    return _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
}

// Weights of 32 tokens as a tile, and their sums.
static inline __attribute__((always_inline)) __m512 share(const float *scores, __m512 factor, __m512 best, i64 token,
                                                          Sight sight, int hidden, bf16 *out) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512i shares[16];
    for (i64 i = 0; i < 16; i++) {
        __m512 even = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + LANES * 2 * i), factor, best));
        __m512 odd = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + LANES * (2 * i + 1)), factor, best));
        if (hidden) {
            even = _mm512_maskz_mov_ps(sees(sight, token + 2 * i), even);
            odd = _mm512_maskz_mov_ps(sees(sight, token + 2 * i + 1), odd);
        }
        sum[0] = _mm512_add_ps(sum[0], even);
        sum[1] = _mm512_add_ps(sum[1], odd);
        shares[i] = pairs(even, odd);
    }
    transpose(shares);
    for (i64 i = 0; i < 16; i++) _mm512_store_si512(out + 32 * i, shares[i]);
    return _mm512_add_ps(sum[0], sum[1]);
}

// Turns scores into weights relative to the best score. That is raised only where it is far below a new one: by less
// than 2^8 no weight overflows, and most spans raise nothing.
static void weigh(const Queries *queries, i64 unit, i64 tokens, const float *scores, Sight sight) {
    const __m512 factor = _mm512_set1_ps(1.44269504f / sqrtf((float)queries->job->contexts->size));
    __m512 greatest = _mm512_set1_ps(-INFINITY);
    for (i64 token = 0; token < tokens; token += 32)
        greatest = _mm512_max_ps(greatest, sees_all(sight, token, token + 32)
                                               ? greatest_of(scores + LANES * token, token, sight, 0)
                                               : greatest_of(scores + LANES * token, token, sight, 1));
    greatest = _mm512_mul_ps(greatest, factor);
    __m512 best = _mm512_load_ps(queries->best + LANES * unit);
    const __mmask16 above = _mm512_cmp_ps_mask(greatest, _mm512_add_ps(best, _mm512_set1_ps(8.0f)), _CMP_GT_OQ);
    if (above) best = raise(queries, unit, above, best, _mm512_mask_mov_ps(best, above, greatest));
    __m512 weight = _mm512_load_ps(queries->weights + LANES * unit);
    for (i64 token = 0; token < tokens; token += 32) {
        const float *from = scores + LANES * token;
        bf16 *to = queries->shares + LANES * token;
        weight = _mm512_add_ps(weight, sees_all(sight, token, token + 32)
                                           ? share(from, factor, best, token, sight, 0, to)
                                           : share(from, factor, best, token, sight, 1, to));
    }
    _mm512_store_ps(queries->weights + LANES * unit, weight);
}

static void add_values(const Queries *queries, i64 unit, i64 tokens) {
    const i64 size = queries->job->contexts->size;
    LOAD(4, queries->shares, 64);
    if (tokens > 32) LOAD(5, queries->shares + 512, 64);
    if (tokens > 64) LOAD(6, queries->shares + 1024, 64);
    if (tokens > 96) LOAD(7, queries->shares + 1536, 64);
    for (i64 head = first_head(queries, unit); head <= last_head(queries, unit); head++) {
        const bf16 *values = queries->values + head * SPAN * size;
        float *sums = sums_of(queries, unit, head);
        for (i64 d = 0; d < size; d += 32, values += 1024, sums += 512) {
            LOAD(0, sums, 64);
            LOAD(1, sums + 256, 64);
            LOAD(2, values, 64);
            MULTIPLY_ADD(0, 4, 2);
            LOAD(3, values + 512, 64);
            MULTIPLY_ADD(1, 4, 3);
            if (tokens > 32) {
                LOAD(2, values + 32 * size, 64);
                MULTIPLY_ADD(0, 5, 2);
                LOAD(3, values + 32 * size + 512, 64);
                MULTIPLY_ADD(1, 5, 3);
            }
            if (tokens > 64) {
                LOAD(2, values + 64 * size, 64);
                MULTIPLY_ADD(0, 6, 2);
                LOAD(3, values + 64 * size + 512, 64);
                MULTIPLY_ADD(1, 6, 3);
            }
            if (tokens > 96) {
                LOAD(2, values + 96 * size, 64);
                MULTIPLY_ADD(0, 7, 2);
                LOAD(3, values + 96 * size + 512, 64);
                MULTIPLY_ADD(1, 7, 3);
            }
            STORE(0, sums, 64);
            STORE(1, sums + 256, 64);
        }
    }
}

// Adds the values of a span, each as much as its score says.
static void add(const Queries *queries, i64 unit, i64 tokens, const float *scores, Sight sight) {
    weigh(queries, unit, tokens, scores, sight);
    add_values(queries, unit, tokens);
}

// The rows of a run, or of all, against tokens `from` to `to` of a slot. `next` is read ahead after the last span.
static void attend(const Queries *queries, i64 run, i64 slot, i64 from, i64 to, const Places *next) {
    const i64 units = (queries->rows + LANES - 1) / LANES;
    Places places[2];
    int at = 0;
    if (from < to) find_places(queries->job, queries->head, slot, from, to, places);
    for (; from < to; from += SPAN, at ^= 1) {
        const i64 until = MIN(to, from + SPAN), tokens = (until - from + 31) / 32 * 32;
        if (until < to) find_places(queries->job, queries->head, slot, until, to, places + (at ^ 1));
        fetch(queries, places + at, until < to ? places + (at ^ 1) : next, tokens);
        // The next unit is scored before this one is weighed: neither waits for what it has just written.
        Sight sight[2];
        i64 waiting = -1;
        int place = 0;
        for (i64 unit = 0; unit < units; unit++) {
            sight[place] = sight_of(queries, unit, run, from, until);
            if (!sees_any(sight[place])) continue;
            score(queries, unit, tokens, queries->scores + place * SPAN * LANES);
            place ^= 1;
            if (waiting >= 0) add(queries, waiting, tokens, queries->scores + place * SPAN * LANES, sight[place]);
            waiting = unit;
        }
        place ^= 1;
        if (waiting >= 0) add(queries, waiting, tokens, queries->scores + place * SPAN * LANES, sight[place]);
    }
}

static i64 group_of(const Contexts *contexts) { return contexts->heads / contexts->kv_heads; }

// Rows of a head.
static i64 rows_of(const Contexts *contexts, const int32_t *task) {
    i64 tokens = 0;
    for (int i = 0; i < task[TASK_COUNT]; i++) tokens += contexts->runs[(task[TASK_RUN] + i) * RUN_FIELDS + RUN_COUNT];
    return tokens * group_of(contexts);
}

static void name_rows(const Queries *queries, const int32_t *runs, i64 count) {
    const i64 group = group_of(queries->job->contexts), lanes = (queries->rows + LANES - 1) / LANES * LANES;
    i64 row = 0;
    for (i64 head = 0; head < queries->job->together; head++)
        for (i64 i = 0; i < count; i++) {
            const int32_t *run = runs + i * RUN_FIELDS;
            for (i64 j = 0; j < run[RUN_COUNT] * group; j++, row++) {
                queries->tokens[row] = run[RUN_TOKEN] + (int32_t)(j / group);
                queries->positions[row] = run[RUN_POSITION] + (int32_t)(j / group);
                queries->runs[row] = (int32_t)i;
            }
        }
    for (; row < lanes; row++) queries->positions[row] = INT32_MAX, queries->runs[row] = -1;
    for (row = 0; row < lanes; row++) queries->best[row] = -1e30f, queries->weights[row] = 0;
}

// Where a row's numbers stand among those of all heads of its token.
static i64 at_row(const Queries *queries, i64 row) {
    const i64 group = group_of(queries->job->contexts), head = queries->head + row / queries->each;
    return (head * group + row % queries->each % group) * queries->job->contexts->size;
}

static void copy_queries(const Queries *queries) {
    const Attention *job = queries->job;
    const i64 size = job->contexts->size, width = job->contexts->heads * size;
    for (i64 unit = 0; unit * LANES < queries->rows; unit++)
        for (i64 head = first_head(queries, unit); head <= last_head(queries, unit); head++)
            for (i64 part = 0; part < size / 32; part++) {
                __m512i lanes[LANES];
                for (i64 lane = 0; lane < LANES; lane++) {
                    const i64 row = unit * LANES + lane;
                    const bf16 *from = job->q + queries->tokens[row] * width + at_row(queries, row) + 32 * part;
                    const int is_there = row < queries->rows && row / queries->each == head;
                    lanes[lane] = is_there ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
                }
                transpose(lanes);
                bf16 *out = q_of(queries, unit, head) + part * 512;
                for (i64 i = 0; i < LANES; i++) _mm512_store_si512(out + 32 * i, lanes[i]);
            }
}

static void copy_results(const Queries *queries) {
    const Attention *job = queries->job;
    const i64 size = job->contexts->size, width = job->contexts->heads * size;
    // Fours of a value's numbers go to one tile and the other in turn.
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (i64 row = 0; row < queries->rows; row++) {
        const __m512 weight = _mm512_set1_ps(queries->weights[row]);
        const float *sums = sums_of(queries, row / LANES, row / queries->each) + row % LANES * 16;
        const i64 token = queries->tokens[row];
        for (i64 d = 0, at = at_row(queries, row); d < size; d += 32, at += 32) {
            const __m512 low = _mm512_load_ps(sums + d * LANES), high = _mm512_load_ps(sums + (d + 16) * LANES);
            bf16 *out = job->out + (job->form == ROWS ? token * width + at : tile_place(token, at, width));
            store_bf16(out, _mm512_div_ps(_mm512_permutex2var_ps(low, first, high), weight));
            store_bf16(out + 16, _mm512_div_ps(_mm512_permutex2var_ps(low, second, high), weight));
        }
    }
}

static void attention_task(void *shared, i64 index, char *memory) {
    const Attention *job = shared;
    const Contexts *contexts = job->contexts;
    const i64 parts = contexts->kv_heads / job->together, next = MIN(index + 1, parts * contexts->num_tasks - 1);
    const int32_t *task = contexts->tasks + index / parts * TASK_FIELDS;
    const int32_t *runs = contexts->runs + task[TASK_RUN] * RUN_FIELDS;
    const int32_t *after = contexts->runs + contexts->tasks[next / parts * TASK_FIELDS + TASK_RUN] * RUN_FIELDS;
    Places places;
    find_places(job, next % parts * job->together, after[RUN_SLOT], 0, after[RUN_POSITION] + after[RUN_COUNT], &places);
    Queries queries = {.job = job, .head = index % parts * job->together};
    lay_out(&queries, memory, rows_of(contexts, task), job->together, contexts->size);
    configure_rows(16, 16);
    name_rows(&queries, runs, task[TASK_COUNT]);
    copy_queries(&queries);
    const i64 units = (queries.rows + LANES - 1) / LANES;
    memset(queries.sums, 0, (size_t)(units * queries.most * contexts->size * LANES) * sizeof(float));
    if (task[TASK_SHARED]) attend(&queries, -1, runs[RUN_SLOT], 0, task[TASK_SHARED], &places);
    for (i64 i = 0; i < task[TASK_COUNT]; i++, runs += RUN_FIELDS) {
        // Spans begin at the same positions whatever is computed together, so that sums are the same.
        const i64 first = contexts->window ? MAX(0, runs[RUN_POSITION] - contexts->window + 1) / SPAN * SPAN : 0;
        attend(&queries, i, runs[RUN_SLOT], MAX(first, task[TASK_SHARED]), runs[RUN_POSITION] + runs[RUN_COUNT], &places);
    }
    copy_results(&queries);
}

static int attend_all(const Contexts *contexts, const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out,
                      int form) {
    // Key/value heads of a token lie side by side: one thread reads them all, if there is enough else to do.
    const int all = contexts->num_tasks >= 4 * max_threads() && contexts->kv_heads <= MOST_TOGETHER;
    Attention job = {q, keys, values, out, contexts, all ? contexts->kv_heads : 1, form};
    Queries queries;
    size_t most = 0;
    for (i64 i = 0; i < contexts->num_tasks; i++) {
        const i64 each = rows_of(contexts, contexts->tasks + i * TASK_FIELDS);
        most = MAX(most, lay_out(&queries, NULL, each, job.together, contexts->size));
    }
    return run(attention_task, &job, contexts->num_tasks * (contexts->kv_heads / job.together), 4, most);
}

int treadle_attention(const Contexts *contexts, const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out) {
    return attend_all(contexts, q, keys, values, out, ROWS);
}

// ---- A decoder's layers --------------------------------------------------------------------------------------------

typedef struct {
    const bf16 *attention_norm, *q_norm, *k_norm, *mlp_norm;
    const Weight *qkv, *o, *gated, *down;
} Layer;

typedef struct {
    i64 tokens, hidden;
    float eps;
    const bf16 *cos, *sin;
    const i64 *places;
    bf16 *kv;
    i64 layer_stride, side_stride;  // between the layers of kv, and between keys and values of one
    bf16 *x, *added, *h, *qkv, *q, *attended, *gated;
} Pass;

// Takes x through all layers, but for what the last one adds to it, which is `added`.
int treadle_layers(const Layer *layers, i64 count, const Pass *pass, const Contexts *contexts) {
    const i64 tokens = pass->tokens, hidden = pass->hidden;
    int ok = normalize(pass->x, NULL, layers->attention_norm, pass->h, tokens, hidden, pass->eps, TILES);
    for (i64 i = 0; i < count && ok; i++) {
        const Layer *layer = layers + i;
        bf16 *keys = pass->kv + i * pass->layer_stride, *values = keys + pass->side_stride;
        ok = multiply_tiles(layer->qkv, pass->h, pass->qkv, tokens, ROWS) &&
             treadle_norm_rope_write(pass->qkv, layer->q_norm, layer->k_norm, pass->eps, pass->cos, pass->sin, keys,
                                     values, pass->places, pass->q, tokens, contexts->heads, contexts->kv_heads,
                                     contexts->size) &&
             attend_all(contexts, pass->q, keys, values, pass->attended, TILES) &&
             multiply_tiles(layer->o, pass->attended, pass->added, tokens, ROWS) &&
             normalize(pass->added, pass->x, layer->mlp_norm, pass->h, tokens, hidden, pass->eps, TILES) &&
             multiply_tiles(layer->gated, pass->h, pass->gated, tokens, TILES) &&
             multiply_tiles(layer->down, pass->gated, pass->added, tokens, ROWS) &&
             (i + 1 == count ||
              normalize(pass->added, pass->x, layer[1].attention_norm, pass->h, tokens, hidden, pass->eps, TILES));
    }
    return ok;
}
