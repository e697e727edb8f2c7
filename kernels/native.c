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

// The place of 16 outputs of a token, of which each has `columns` times 16.
static inline i64 place_of(int form, i64 token, i64 column, i64 columns) {
    if (form != TILES) return (token * columns + column) * 16;
    return tile_place(token, 16 * column, 16 * columns) + column % 2 * 16;
}

static inline __attribute__((always_inline)) void put(void *out, int form, i64 place, __m512 sum) {
    if (form == WIDE_ROWS)
        _mm512_storeu_ps((float *)out + place, sum);
    else
        store_bf16((bf16 *)out + place, sum);
}

static inline __m512 silu(__m512 x) {
    const __m512 divisor = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
    return _mm512_div_ps(x, divisor);
}

// Sums of up to 32 tokens by 32 outputs, some of which are outputs already.
typedef struct {
    const Product *product;
    const float *sums;
    Pair pair;
    i64 token;
    int rows, done;
} Block;

static inline __attribute__((always_inline)) void finish_as(Block *block, int until, int form, int gated) {
    const Product *product = block->product;
    const Weight *weight = product->weight;
    const Pair pair = block->pair;
    const i64 columns = weight->out / (gated ? 32 : 16);
    __m512 first_bias = _mm512_setzero_ps(), second_bias = first_bias;
    if (weight->bias) {
        first_bias = load_bf16(weight->bias + 16 * pair.first);
        second_bias = load_bf16(weight->bias + 16 * pair.second);
    }
    for (; block->done < until; block->done++) {
        const i64 token = block->token + block->done;
        const float *sums = block->sums + 32 * block->done;
        const __m512 first = _mm512_add_ps(_mm512_load_ps(sums), first_bias);
        const __m512 second = _mm512_add_ps(_mm512_load_ps(sums + 16), second_bias);
        const i64 place = place_of(form, token, pair.first, columns);
        if (gated) {
            put(product->out, form, place, _mm512_mul_ps(silu(first), second));
        } else {
            put(product->out, form, place, first);
            put(product->out, form, place_of(form, token, pair.second, columns), second);
        }
    }
}

// Makes outputs of some more rows.
static __attribute__((noinline)) void finish(Block *block, int rows) {
    const int until = MIN(block->done + rows, block->rows);
    if (block->done == until) return;
    if (block->product->weight->gated) {
        switch (block->product->form) {
            case ROWS: finish_as(block, until, ROWS, 1); break;
            case WIDE_ROWS: finish_as(block, until, WIDE_ROWS, 1); break;
            case TILES: finish_as(block, until, TILES, 1); break;
        }
    } else {
        switch (block->product->form) {
            case ROWS: finish_as(block, until, ROWS, 0); break;
            case WIDE_ROWS: finish_as(block, until, WIDE_ROWS, 0); break;
            case TILES: finish_as(block, until, TILES, 0); break;
        }
    }
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
                    float *block = sums + (token - near) * 32;
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

enum { LEAST_SHARED = 1 << 16 };  // numbers, for which it is worth it to wake another thread

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
// One task: the queries of some tokens and of the heads that share one key/value head, against a context that is read
// from its pages 64 tokens at a time. For each query there are a score near the greatest so far, the sum of weights
// relative to it, and the weighted sum of values (online softmax, Milakov and Gimelshein 2018). Tokens of several calls
// whose contexts begin alike are one task: they go through that beginning together, then each through its own rest.
//
// 16 queries are a unit: whatever belongs to one of them is in a lane of its own, so that softmax needs no sum and no
// maximum across lanes. Scores are keys times queries, and results are values, turned, times weights:
//
//   keys [64 tokens, D] x queries [D, 16]  ->  scores, weights [64 tokens, 16];  values [D, 64 tokens] x weights

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
    i64 together;  // key/value heads that a thread goes through one after the other
    int form;
} Attention;

// A run of tokens of one call: its first token in the step, how many, its slot, and the position of the first.
enum { RUN_TOKEN, RUN_COUNT, RUN_SLOT, RUN_POSITION, RUN_FIELDS };
// A task: its first run, how many, and the tokens that their contexts share.
enum { TASK_RUN, TASK_COUNT, TASK_SHARED, TASK_FIELDS };

// The queries of a task that one key/value head answers, in the order of tokens, and the span that they look at.
typedef struct {
    const Attention *job;
    i64 head, rows;
    bf16 *q;             // [units, D / 32] tiles: of each two numbers of a head, 16 queries in pairs
    float *sums;         // [units, D, LANES]
    float *best;         // [units, LANES]
    float *weights;      // the same
    int32_t *positions;  // the same
    bf16 *keys;          // [4, D / 32] tiles: 16 tokens
    bf16 *values;        // [2, D / 16] tiles: 16 numbers of a head by 32 tokens
    float *scores;       // two units of [SPAN, LANES]
    bf16 *shares;        // [2] tiles: of each two tokens, 16 queries in pairs
} Query;

static size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

static size_t lay_out(Query *query, char *memory, i64 rows, i64 size) {
    size_t at = 0;
    const size_t units = (size_t)((rows + LANES - 1) / LANES), lanes = units * LANES, width = (size_t)size;
#define PLACE(field, bytes) query->field = (void *)(memory + at), at += aligned(bytes)
    PLACE(q, lanes * width * sizeof(bf16));
    PLACE(sums, lanes * width * sizeof(float));
    PLACE(best, lanes * sizeof(float));
    PLACE(weights, lanes * sizeof(float));
    PLACE(positions, lanes * sizeof(int32_t));
    PLACE(keys, width * SPAN * sizeof(bf16));
    PLACE(values, width * SPAN * sizeof(bf16));
    PLACE(scores, 2 * SPAN * LANES * sizeof(float));
    PLACE(shares, SPAN * LANES * sizeof(bf16));
#undef PLACE
    return at;
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

// Where the keys and values of a head begin, of each token of a span; those behind the last are at -1.
typedef struct {
    i64 at[SPAN];
} Places;

static void find_places(const Attention *job, i64 head, i64 slot, i64 from, i64 to, Places *places) {
    const Contexts *contexts = job->contexts;
    const i64 *table = contexts->page_table + slot * contexts->pages_per_slot;
    for (i64 i = 0; i < SPAN; i++) {
        const i64 token = from + i;
        if (token >= to) {
            places->at[i] = -1;
            continue;
        }
        const i64 place = table[token / contexts->page_size] * contexts->page_size + token % contexts->page_size;
        places->at[i] = (place * contexts->kv_heads + head) * contexts->size;
    }
}

// Has memory send a row of the span that comes next.
static inline __attribute__((always_inline)) void send(const bf16 *rows, i64 place) {
    if (place >= 0) _mm_prefetch((const char *)(rows + place), _MM_HINT_T1);
}

// Brings keys and values of a span into tiles; what is behind the last token becomes zero.
static void fetch(const Query *query, const Places *places, const Places *next) {
    const i64 size = query->job->contexts->size;
    const __m512i zero = _mm512_setzero_si512();
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (i64 part = 0; part < size / 32; part++) {
        const bf16 *keys = query->job->keys + 32 * part, *values = query->job->values + 32 * part;
        for (i64 token = 0; token < SPAN; token++) {
            const i64 place = places->at[token];
            bf16 *out = query->keys + (token / 16 * (size / 32) + part) * 512 + token % 16 * 32;
            _mm512_store_si512(out, place < 0 ? zero : _mm512_loadu_si512(keys + place));
            send(keys, next->at[token]);
        }
        for (i64 half = 0; half < 2; half++) {
            __m512i first[16], second[16];
            for (i64 i = 0; i < 16; i++) {
                const i64 token = 32 * half + 2 * i;
                const __m512i even = places->at[token] < 0 ? zero : _mm512_loadu_si512(values + places->at[token]);
                const __m512i odd = places->at[token + 1] < 0 ? zero : _mm512_loadu_si512(values + places->at[token + 1]);
                first[i] = _mm512_permutex2var_epi16(even, low, odd);
                second[i] = _mm512_permutex2var_epi16(even, high, odd);
                send(values, next->at[token]);
                send(values, next->at[token + 1]);
            }
            transpose(first);
            transpose(second);
            bf16 *out = query->values + (half * (size / 16) + 2 * part) * 512;
            for (i64 i = 0; i < 16; i++) {
                _mm512_store_si512(out + 32 * i, first[i]);
                _mm512_store_si512(out + 512 + 32 * i, second[i]);
            }
        }
    }
}

// Scores of the keys of a span with a unit.
static void score(const Query *query, i64 unit, float *scores) {
    const i64 parts = query->job->contexts->size / 32;
    const bf16 *q = query->q + unit * parts * 512, *keys = query->keys;
    CLEAR(0);
    CLEAR(1);
    CLEAR(2);
    CLEAR(3);
    for (i64 part = 0; part < parts; part++, keys += 512) {
        LOAD(4, q + 512 * part, 64);
        LOAD(5, keys, 64);
        MULTIPLY_ADD(0, 5, 4);
        LOAD(6, keys + 512 * parts, 64);
        MULTIPLY_ADD(1, 6, 4);
        LOAD(5, keys + 1024 * parts, 64);
        MULTIPLY_ADD(2, 5, 4);
        LOAD(6, keys + 1536 * parts, 64);
        MULTIPLY_ADD(3, 6, 4);
    }
    STORE(0, scores, 64);
    STORE(1, scores + 256, 64);
    STORE(2, scores + 512, 64);
    STORE(3, scores + 768, 64);
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

// What of a span the lanes of a unit see.
typedef struct {
    __m512i first, last;  // tokens, counted from the begin of the span
} Sight;

static inline __mmask16 sees(Sight sight, i64 token) {
    const __m512i index = _mm512_set1_epi32((int)token);
    return _mm512_cmple_epi32_mask(index, sight.last) & _mm512_cmpge_epi32_mask(index, sight.first);
}

// Turns scores into weights relative to the best score, which is raised, and what there is so far with it, where it is
// far below a new one: by less than 2^8 no weight overflows, and most spans raise nothing.
static inline __attribute__((always_inline)) void weigh_as(const Query *query, i64 unit, const float *scores,
                                                           Sight sight, int hidden) {
    const i64 size = query->job->contexts->size;
    const __m512 factor = _mm512_set1_ps(1.44269504f / sqrtf((float)size)), none = _mm512_set1_ps(-INFINITY);
    __m512 greatest = none;
    for (i64 token = 0; token < SPAN; token++) {
        const __m512 score = _mm512_load_ps(scores + LANES * token);
        greatest = hidden ? _mm512_mask_max_ps(greatest, sees(sight, token), greatest, score)
                          : _mm512_max_ps(greatest, score);
    }
    greatest = _mm512_mul_ps(greatest, factor);
    __m512 best = _mm512_load_ps(query->best + LANES * unit), weight = _mm512_load_ps(query->weights + LANES * unit);
    const __mmask16 raised =
        _mm512_cmp_ps_mask(greatest, _mm512_add_ps(best, _mm512_set1_ps(8.0f)), _CMP_GT_OQ);
    if (raised) {
        const __m512 raise = _mm512_mask_mov_ps(best, raised, greatest);
        const __m512 shrink = power_of_two(_mm512_sub_ps(best, raise));
        float *sums = query->sums + unit * size * LANES;
        for (i64 d = 0; d < size; d++)
            _mm512_store_ps(sums + LANES * d, _mm512_mul_ps(_mm512_load_ps(sums + LANES * d), shrink));
        weight = _mm512_mul_ps(weight, shrink);
        best = raise;
        _mm512_store_ps(query->best + LANES * unit, best);
    }
    for (i64 token = 0; token < SPAN; token += 2) {
        __m512 even = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + LANES * token), factor, best));
        __m512 odd = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + LANES * (token + 1)), factor, best));
        if (hidden) {
            even = _mm512_maskz_mov_ps(sees(sight, token), even);
            odd = _mm512_maskz_mov_ps(sees(sight, token + 1), odd);
        }
        weight = _mm512_add_ps(weight, _mm512_add_ps(even, odd));
        _mm512_store_si512(query->shares + LANES * token, pairs(even, odd));
    }
    _mm512_store_ps(query->weights + LANES * unit, weight);
}

// `begin` to `end` are the rows that look at the span, which is hidden from other rows in the unit. Lanes without a row
// see whatever they like.
static void weigh(const Query *query, i64 unit, i64 begin, i64 end, i64 from, i64 to, const float *scores) {
    const i64 window = query->job->contexts->window;
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i row = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)(unit * LANES)));
    const __mmask16 idle = _mm512_cmplt_epi32_mask(row, _mm512_set1_epi32((int)begin)) |
                           (_mm512_cmpge_epi32_mask(row, _mm512_set1_epi32((int)end)) &
                            _mm512_cmplt_epi32_mask(row, _mm512_set1_epi32((int)query->rows)));
    const __m512i position = _mm512_sub_epi32(_mm512_load_si512(query->positions + LANES * unit), _mm512_set1_epi32((int)from));
    Sight sight = {_mm512_setzero_si512(), _mm512_min_epi32(position, _mm512_set1_epi32((int)(to - from - 1)))};
    if (window) sight.first = _mm512_sub_epi32(position, _mm512_set1_epi32((int)window - 1));
    sight.last = _mm512_mask_mov_epi32(sight.last, idle, _mm512_set1_epi32(-1));
    const __mmask16 whole = _mm512_cmpge_epi32_mask(sight.last, _mm512_set1_epi32(SPAN - 1)) &
                            _mm512_cmple_epi32_mask(sight.first, _mm512_setzero_si512());
    if (whole == 0xffff)
        weigh_as(query, unit, scores, sight, 0);
    else
        weigh_as(query, unit, scores, sight, 1);
}

static void add_values(const Query *query, i64 unit) {
    const i64 size = query->job->contexts->size, columns = size / 16;
    LOAD(4, query->shares, 64);
    LOAD(5, query->shares + 512, 64);
    for (i64 column = 0; column < columns; column++) {
        float *sums = query->sums + (unit * size + 16 * column) * LANES;
        LOAD(0, sums, 64);
        LOAD(6, query->values + column * 512, 64);
        MULTIPLY_ADD(0, 6, 4);
        LOAD(7, query->values + (columns + column) * 512, 64);
        MULTIPLY_ADD(0, 7, 5);
        STORE(0, sums, 64);
    }
}

// Rows `begin` to `end` against tokens `from` to `to` of a slot. `next` is read ahead after the last span.
static void attend(const Query *query, i64 begin, i64 end, i64 slot, i64 from, i64 to, const Places *next) {
    const i64 window = query->job->contexts->window;
    const int32_t *positions = query->positions;
    // Rows are in the order of their positions: the first sees least far ahead, and farthest back. Spans begin at the
    // same positions whatever is computed together, so that sums are the same.
    if (window) from = MAX(from, (positions[begin] - window + 1) / SPAN * SPAN);
    to = MIN(to, positions[end - 1] + 1);
    Places places[2];
    int at = 0;
    if (from < to) find_places(query->job, query->head, slot, from, to, places);
    for (; from < to; from += SPAN, at ^= 1) {
        const i64 until = MIN(to, from + SPAN);
        if (until < to) find_places(query->job, query->head, slot, until, to, places + (at ^ 1));
        fetch(query, places + at, until < to ? places + (at ^ 1) : next);
        i64 unit = begin / LANES;
        while (positions[MIN(end, (unit + 1) * LANES) - 1] < from) unit++;
        i64 last = (end - 1) / LANES;
        if (window)
            while (positions[MAX(begin, last * LANES)] - window + 1 >= from + SPAN) last--;
        // The next unit is scored while this one is weighed.
        score(query, unit, query->scores + unit % 2 * SPAN * LANES);
        for (; unit <= last; unit++) {
            if (unit < last) score(query, unit + 1, query->scores + (unit + 1) % 2 * SPAN * LANES);
            weigh(query, unit, begin, end, from, until, query->scores + unit % 2 * SPAN * LANES);
            add_values(query, unit);
        }
    }
}

static i64 group_of(const Contexts *contexts) { return contexts->heads / contexts->kv_heads; }

static i64 rows_of(const Contexts *contexts, const int32_t *task) {
    i64 tokens = 0;
    for (int i = 0; i < task[TASK_COUNT]; i++) tokens += contexts->runs[(task[TASK_RUN] + i) * RUN_FIELDS + RUN_COUNT];
    return tokens * group_of(contexts);
}

// Copies the queries of a task to their lanes, and says what their positions are. Lanes without one are zero.
static void copy_queries(const Query *query, const int32_t *runs, i64 count, i64 rows) {
    const Attention *job = query->job;
    const i64 size = job->contexts->size, group = group_of(job->contexts), parts = size / 32;
    const bf16 *places[LANES];
    i64 row = 0;
    for (i64 i = 0; i < count; i++) {
        const int32_t *run = runs + i * RUN_FIELDS;
        for (i64 j = 0; j < run[RUN_COUNT] * group; j++, row++) {
            const i64 token = run[RUN_TOKEN] + j / group, lane = row % LANES;
            places[lane] = job->q + (token * job->contexts->heads + query->head * group + j % group) * size;
            query->positions[row] = run[RUN_POSITION] + (int32_t)(j / group);
            if (lane < LANES - 1 && row < rows - 1) continue;
            for (i64 part = 0; part < parts; part++) {
                __m512i lanes[LANES];
                for (i64 k = 0; k < LANES; k++)
                    lanes[k] = k > lane ? _mm512_setzero_si512() : _mm512_loadu_si512(places[k] + 32 * part);
                transpose(lanes);
                bf16 *out = query->q + (row / LANES * parts + part) * 512;
                for (i64 k = 0; k < LANES; k++) _mm512_store_si512(out + 32 * k, lanes[k]);
            }
        }
    }
}

// Copies what came of a run, whose first row is given.
static void copy_results(const Query *query, const int32_t *run, i64 row) {
    const Attention *job = query->job;
    const i64 heads = job->contexts->heads, size = job->contexts->size, group = group_of(job->contexts);
    const i64 end = row + run[RUN_COUNT] * group, begin = row;
    for (i64 unit = begin / LANES; unit * LANES < end; unit++) {
        const __m512 weight = _mm512_load_ps(query->weights + LANES * unit);
        for (i64 d = 0; d < size; d += 16) {
            const float *sums = query->sums + (unit * size + d) * LANES;
            __m512i lanes[LANES];
            for (i64 i = 0; i < 16; i++)
                lanes[i] = _mm512_castps_si512(_mm512_div_ps(_mm512_load_ps(sums + LANES * i), weight));
            transpose(lanes);
            for (i64 k = MAX(begin, unit * LANES); k < MIN(end, (unit + 1) * LANES); k++) {
                const i64 token = run[RUN_TOKEN] + (k - begin) / group;
                const i64 at = (query->head * group + (k - begin) % group) * size + d;
                const i64 place = job->form == ROWS ? token * heads * size + at
                                                    : tile_place(token, at, heads * size) + at % 32;
                store_bf16(job->out + place, _mm512_castsi512_ps(lanes[k % LANES]));
            }
        }
    }
}

// `next` is what the thread reads after this.
static void attention_of_head(const Attention *job, const int32_t *task, i64 head, const Places *next, char *memory) {
    const Contexts *contexts = job->contexts;
    const int32_t *runs = contexts->runs + task[TASK_RUN] * RUN_FIELDS;
    const i64 rows = rows_of(contexts, task), count = task[TASK_COUNT], shared = task[TASK_SHARED];
    const i64 lanes = (rows + LANES - 1) / LANES * LANES;
    Query query = {.job = job, .head = head, .rows = rows};
    lay_out(&query, memory, rows, contexts->size);
    copy_queries(&query, runs, count, rows);
    memset(query.sums, 0, (size_t)(lanes * contexts->size) * sizeof(float));
    for (i64 row = 0; row < lanes; row++) query.best[row] = -1e30f, query.weights[row] = 0;
    for (i64 row = rows; row < lanes; row++) query.positions[row] = INT32_MAX;
    if (shared) attend(&query, 0, rows, runs[RUN_SLOT], 0, shared, next);
    i64 row = 0;
    for (i64 i = 0; i < count; i++) {
        const int32_t *run = runs + i * RUN_FIELDS;
        const i64 end = row + run[RUN_COUNT] * group_of(contexts);
        attend(&query, row, end, run[RUN_SLOT], shared, run[RUN_POSITION] + run[RUN_COUNT], next);
        copy_results(&query, run, row);
        row = end;
    }
}

static void attention_task(void *shared, i64 index, char *memory) {
    const Attention *job = shared;
    const Contexts *contexts = job->contexts;
    const i64 parts = contexts->kv_heads / job->together, count = parts * contexts->num_tasks;
    configure_rows(16, 16);
    for (i64 i = 0; i < job->together; i++) {
        const i64 head = index % parts * job->together + i;
        // The next head, or the first of the next task.
        const i64 following = i + 1 < job->together ? index : MIN(index + 1, count - 1);
        const i64 next_head = following == index ? MIN(head + 1, contexts->kv_heads - 1) : following % parts * job->together;
        const int32_t *task = contexts->tasks + following / parts * TASK_FIELDS;
        const int32_t *run = contexts->runs + task[TASK_RUN] * RUN_FIELDS;
        Places next;
        find_places(job, next_head, run[RUN_SLOT], 0, run[RUN_POSITION] + run[RUN_COUNT], &next);
        attention_of_head(job, contexts->tasks + index / parts * TASK_FIELDS, head, &next, memory);
    }
}

static int attend_all(const Contexts *contexts, const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out,
                      int form) {
    // Key/value heads of a token lie side by side: one thread reads them all, if there is enough else to do.
    const int all = contexts->num_tasks >= 4 * max_threads() && contexts->kv_heads <= MOST_TOGETHER;
    Attention job = {q, keys, values, out, contexts, all ? contexts->kv_heads : 1, form};
    Query query;
    i64 most = 0;
    for (i64 i = 0; i < contexts->num_tasks; i++) most = MAX(most, rows_of(contexts, contexts->tasks + i * TASK_FIELDS));
    const i64 count = contexts->num_tasks * (contexts->kv_heads / job.together);
    return run(attention_task, &job, count, 4, lay_out(&query, NULL, most, contexts->size));
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
