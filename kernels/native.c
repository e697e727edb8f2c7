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
// Weights lie in blocks of 32 inputs by 16 outputs, all blocks of the first 16 outputs first. A block is, in
//
//   bfloat16   1,024 bytes, a tile: for each two inputs, 16 outputs of them in pairs
//   8 bits     16 scales and 16 minima (float16), then for each four inputs, 16 outputs of 4 codes
//   4 bits     16 scales and 16 minima (float16), then for each eight inputs, 16 outputs of 4 codes with those of the
//              four inputs after them in their upper halves
//
// and a coded weight is scale * code + minimum. A few tokens are multiplied with the codes themselves, many with
// weights that are expanded to bfloat16 on the way.

enum { BF16 = 0, INT8 = 1, INT4 = 2 };
static const i64 BLOCK_BYTES[] = {1024, 64 + 512, 64 + 256};
enum { PREFETCH = 2048 };  // bytes ahead of what is read once, from memory

typedef struct {
    i64 format, in, out;
    i64 gated;  // the first half of the outputs are gates of the second: what comes out is silu(gate) * other
    const uint8_t *blocks;
    const bf16 *bias;
} Weight;

typedef struct {
    const Weight *weight;
    const bf16 *x;
    void *out;
    i64 tokens;
    int wide;
    i64 pairs;  // pairs of 16 outputs in a task
} Product;

// Inlined by force: to a compiler a function that only prefetches has no effect, and its calls are left out.
static inline __attribute__((always_inline)) void prefetch(const uint8_t *from, i64 bytes) {
    for (i64 i = 0; i < bytes; i += 64) _mm_prefetch((const char *)from + PREFETCH + i, _MM_HINT_T0);
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

static inline void put(const Product *product, i64 token, i64 column, i64 columns, __m512 sum) {
    const i64 to = (token * columns + column) * 16;
    if (product->wide)
        _mm512_storeu_ps((float *)product->out + to, sum);
    else
        store_bf16((bf16 *)product->out + to, sum);
}

static inline void put_pair(const Product *product, i64 token, Pair pair, __m512 first, __m512 second) {
    const Weight *weight = product->weight;
    if (weight->bias) {
        first = _mm512_add_ps(first, load_bf16(weight->bias + 16 * pair.first));
        second = _mm512_add_ps(second, load_bf16(weight->bias + 16 * pair.second));
    }
    if (weight->gated) {
        const __m512 divisor =
            _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), first)));
        put(product, token, pair.first, weight->out / 32, _mm512_mul_ps(_mm512_div_ps(first, divisor), second));
    } else {
        put(product, token, pair.first, weight->out / 16, first);
        put(product, token, pair.second, weight->out / 16, second);
    }
}

// Many tokens: weights expanded to tiles of bfloat16.

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

// A pair of columns as tiles, [in / 32, 2].
static void expand(const Weight *weight, Pair pair, char *memory) {
    const i64 steps = weight->in / 32, size = BLOCK_BYTES[weight->format];
    for (i64 i = 0; i < 2; i++) {
        const uint8_t *block = weight->blocks + (i ? pair.second : pair.first) * steps * size;
        for (i64 step = 0; step < steps; step++, block += size) {
            prefetch(block, size);
            __m512i *tile = (__m512i *)(memory + 1024 * (2 * step + i));
            if (weight->format == INT4)
                expand_block(block, INT4, tile);
            else
                expand_block(block, INT8, tile);
        }
    }
}

// Up to 32 tokens by 32 outputs of the sum over all inputs, into `sums` of 32 by 32.
static void multiply(const bf16 *x, i64 in, int rows, const uint8_t *first, const uint8_t *second, i64 stride,
                     float *sums) {
    CLEAR(0);
    CLEAR(1);
    CLEAR(2);
    CLEAR(3);
    for (i64 step = 0; step < in / 32; step++, first += stride, second += stride) {
        LOAD(6, first, 64);
        LOAD(4, x + 32 * step, 2 * in);
        LOAD(7, second, 64);
        if (rows > 16) LOAD(5, x + 16 * in + 32 * step, 2 * in);
        MULTIPLY_ADD(0, 4, 6);
        MULTIPLY_ADD(1, 4, 7);
        if (rows > 16) {
            MULTIPLY_ADD(2, 5, 6);
            MULTIPLY_ADD(3, 5, 7);
        }
    }
    STORE(0, sums, 128);
    STORE(1, sums + 16, 128);
    if (rows > 16) {
        STORE(2, sums + 16 * 32, 128);
        STORE(3, sums + 16 * 32 + 16, 128);
    }
}

static void many_tokens(void *job, i64 index, char *memory) {
    const Product *product = job;
    const Weight *weight = product->weight;
    const i64 in = weight->in, begin = product->pairs * index, end = MIN(begin + product->pairs, count_pairs(weight));
    float ALIGNED sums[32 * 32];
    if (weight->format != BF16)
        for (i64 i = begin; i < end; i++) expand(weight, pair_at(weight, i), memory + (i - begin) * 64 * in);
    for (i64 token = 0; token < product->tokens; token += 32) {
        const int rows = (int)MIN(32, product->tokens - token);
        configure_rows(MIN(rows, 16), rows - 16);
        for (i64 i = begin; i < end; i++) {
            const Pair pair = pair_at(weight, i);
            const uint8_t *tiles = (const uint8_t *)memory + (i - begin) * 64 * in;
            if (weight->format == BF16)
                multiply(product->x + token * in, in, rows, weight->blocks + 32 * in * pair.first,
                         weight->blocks + 32 * in * pair.second, 1024, sums);
            else
                multiply(product->x + token * in, in, rows, tiles, tiles + 1024, 2048, sums);
            for (int row = 0; row < rows; row++)
                put_pair(product, token + row, pair, _mm512_load_ps(sums + 32 * row),
                         _mm512_load_ps(sums + 32 * row + 16));
        }
    }
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
    column_of_few(few, pair.first, format, rows, first);
    column_of_few(few, pair.second, format, rows, second);
    for (int row = 0; row < rows; row++) put_pair(&few->product, row, pair, first[row], second[row]);
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
    const i64 groups = product.tokens * (product.weight->in / 32);
    if (!reserve((size_t)groups * (sizeof(Digits) + 2 * sizeof(float)))) return 0;
    // No thread's scratch is moved while they read this one: they are given no bytes more.
    Digits *digits = (Digits *)scratch;
    float *units = (float *)(digits + groups), *totals = units + groups;
    for (i64 i = 0; i < groups; i++) to_digits(product.x + 32 * i, digits + i, units + i, totals + i);
    FewTokens few = {product, digits, units, totals};
    return run(few_tokens, &few, count_pairs(product.weight), 2, 0);
}

int treadle_linear(const Weight *weight, const bf16 *x, void *out, i64 tokens, int wide) {
    Product product = {weight, x, out, tokens, wide, 1};
    if (weight->format != BF16 && tokens <= FEW) return multiply_few(product);
    // Many tokens are read once for as many outputs as possible, which are few enough to give every thread its part.
    const i64 pairs = count_pairs(weight);
    if (tokens > 32) product.pairs = MAX(1, MIN(8, pairs / (4 * max_threads())));
    const i64 bytes = weight->format == BF16 ? 0 : 64 * weight->in * product.pairs;
    return run(many_tokens, &product, (pairs + product.pairs - 1) / product.pairs, 8, (size_t)bytes);
}

// ---- What stands between products ----------------------------------------------------------------------------------

enum { LEAST_SHARED = 1 << 16 };  // numbers, for which it is worth it to wake another thread

typedef struct {
    const bf16 *x, *weight;
    bf16 *total, *out;
    i64 tokens, size;
    float eps;
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
    scale_by(x, inverse_rms(x, size, norm->eps), norm->weight, size, norm->out + token * size);
}

// The norm of x + total, where total becomes that sum; of x if there is no total.
int treadle_norm(const bf16 *x, bf16 *total, const bf16 *weight, bf16 *out, i64 tokens, i64 size, float eps) {
    Norm norm = {x, weight, total, out, tokens, size, eps};
    if (tokens * size < LEAST_SHARED) {
        for (i64 token = 0; token < tokens; token++) norm_token(&norm, token, NULL);
        return 1;
    }
    return run(norm_token, &norm, tokens, 4, 0);
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
// from its pages 64 tokens at a time. For each query there are the greatest score so far, the sum of weights relative
// to it, and the weighted sum of values (online softmax, Milakov and Gimelshein 2018). Tokens of several calls whose
// contexts begin alike are one task: they go through that beginning together, then each through its own rest.

enum { SPAN = 64, MOST_UNITS = 4, MOST_TOGETHER = 8 };

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
} Attention;

// A run of tokens of one call: its first token in the step, how many, its slot, and the position of the first.
enum { RUN_TOKEN, RUN_COUNT, RUN_SLOT, RUN_POSITION, RUN_FIELDS };
// A task: its first run, how many, and the tokens that their contexts share.
enum { TASK_RUN, TASK_COUNT, TASK_SHARED, TASK_FIELDS };

// The queries of a task that one key/value head answers, in the order of tokens.
typedef struct {
    const Attention *job;
    i64 head;
    int leads;        // the first of the heads that the same thread goes through
    bf16 *q;          // [rows, D]
    float *sums;      // the same
    float *best;      // [rows]
    float *weights;   // the same
    i64 *positions;   // the same
    bf16 *keys;       // [D / 32, 4] tiles
    bf16 *values;     // [2, D / 16] tiles
    float *scores;    // [units, 16, SPAN]
    bf16 *shares;     // the same
} Query;

// Up to 16 queries that are computed together.
typedef struct {
    i64 row;
    int rows;
} Unit;

static size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

static size_t lay_out(Query *query, char *memory, i64 rows, i64 size) {
    size_t at = 0;
    const size_t width = (size_t)size, tiles = (size_t)(size * SPAN);
    const size_t units = (size_t)(MOST_UNITS * 16 * SPAN);
#define PLACE(field, bytes) query->field = (void *)(memory + at), at += aligned(bytes)
    PLACE(q, (size_t)rows * width * sizeof(bf16));
    PLACE(sums, (size_t)rows * width * sizeof(float));
    PLACE(best, (size_t)rows * sizeof(float));
    PLACE(weights, (size_t)rows * sizeof(float));
    PLACE(positions, (size_t)rows * sizeof(i64));
    PLACE(keys, tiles * sizeof(bf16));
    PLACE(values, tiles * sizeof(bf16));
    PLACE(scores, units * sizeof(float));
    PLACE(shares, units * sizeof(bf16));
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

// Has memory send what a head, and those that the same thread goes through after it, will read of up to 64 tokens.
static inline __attribute__((always_inline)) void look_ahead(const Attention *job, i64 head, i64 slot, i64 from, i64 to) {
    const Contexts *contexts = job->contexts;
    const i64 size = contexts->size, *table = contexts->page_table + slot * contexts->pages_per_slot;
    for (i64 token = from; token < MIN(to, from + SPAN); token++) {
        const i64 place = table[token / contexts->page_size] * contexts->page_size + token % contexts->page_size;
        for (i64 d = 0; d < job->together * size; d += 32) {
            _mm_prefetch((const char *)(job->keys + (place * contexts->kv_heads + head) * size + d), _MM_HINT_T1);
            _mm_prefetch((const char *)(job->values + (place * contexts->kv_heads + head) * size + d), _MM_HINT_T1);
        }
    }
}

// Brings keys and values of up to 64 tokens of a slot into tiles; what is behind the last becomes zero.
static void fetch(const Query *query, i64 slot, i64 from, i64 to) {
    const Attention *job = query->job;
    const i64 size = job->contexts->size, row = job->contexts->kv_heads * size, tiles = (to - from + 15) / 16;
    const i64 *table = job->contexts->page_table + slot * job->contexts->pages_per_slot;
    i64 places[SPAN];
    for (i64 i = 0; i < to - from; i++) {
        const i64 token = from + i, page = table[token / job->contexts->page_size];
        places[i] = (page * job->contexts->page_size + token % job->contexts->page_size) * row + query->head * size;
    }
    for (i64 i = to - from; i < SPAN; i++) places[i] = -1;
    const __m512i zero = _mm512_setzero_si512();
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (i64 part = 0; part < size / 32; part++) {
        const bf16 *keys = job->keys + 32 * part, *values = job->values + 32 * part;
        for (i64 tile = 0; tile < tiles; tile++) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++) {
                const i64 place = places[16 * tile + i];
                rows[i] = place < 0 ? zero : _mm512_loadu_si512(keys + place);
            }
            transpose(rows);
            bf16 *out = query->keys + (4 * part + tile) * 512;
            for (int i = 0; i < 16; i++) _mm512_store_si512(out + 32 * i, rows[i]);
        }
        for (i64 pair = 0; pair < (tiles + 1) / 2 * 16; pair++) {
            const i64 even = places[2 * pair], odd = places[2 * pair + 1];
            const __m512i first = even < 0 ? zero : _mm512_loadu_si512(values + even);
            const __m512i second = odd < 0 ? zero : _mm512_loadu_si512(values + odd);
            bf16 *out = query->values + (pair / 16 * (size / 16) + 2 * part) * 512 + pair % 16 * 32;
            _mm512_store_si512(out, _mm512_permutex2var_epi16(first, low, second));
            _mm512_store_si512(out + 512, _mm512_permutex2var_epi16(first, high, second));
        }
    }
}

// Scores of a unit with the keys in tiles.
static void score(const Query *query, Unit unit, i64 tiles, float *scores) {
    const i64 size = query->job->contexts->size;
    const bf16 *q = query->q + unit.row * size, *keys = query->keys;
    CLEAR(0);
    CLEAR(1);
    CLEAR(2);
    CLEAR(3);
    for (i64 part = 0; part < size / 32; part++, keys += 4 * 512) {
        LOAD(4, q + 32 * part, 2 * size);
        LOAD(6, keys, 64);
        MULTIPLY_ADD(0, 4, 6);
        if (tiles > 1) {
            LOAD(7, keys + 512, 64);
            MULTIPLY_ADD(1, 4, 7);
        }
        if (tiles > 2) {
            LOAD(6, keys + 1024, 64);
            MULTIPLY_ADD(2, 4, 6);
        }
        if (tiles > 3) {
            LOAD(7, keys + 1536, 64);
            MULTIPLY_ADD(3, 4, 7);
        }
    }
    STORE(0, scores, 4 * SPAN);
    STORE(1, scores + 16, 4 * SPAN);
    STORE(2, scores + 32, 4 * SPAN);
    STORE(3, scores + 48, 4 * SPAN);
}

// Two to the power of x, to 1e-4 of it, which is a twentieth of what rounding to bfloat16 does; 0 far below.
static inline __m512 power_of_two(__m512 x) {
    const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(9.6181291e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(normal, p, whole);
}

// Turns the scores of a query into weights relative to its new greatest score, and what it has so far as well.
static void weigh(const Query *query, i64 row, i64 from, i64 to, const float *scores, bf16 *shares) {
    const Attention *job = query->job;
    const i64 position = query->positions[row], size = job->contexts->size;
    const i64 first = job->contexts->window ? MAX(position - job->contexts->window + 1 - from, 0) : 0;
    const i64 last = MIN(position + 1, to) - from;
    const float factor = 1.44269504f / sqrtf((float)size);
    __m512 score[4];
    for (int i = 0; i < 4; i++) score[i] = _mm512_load_ps(scores + 16 * i);
    if (first > 0 || last < SPAN) {
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        for (int i = 0; i < 4; i++) {
            const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(16 * i));
            const __mmask16 hidden = _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32((int)MIN(first, SPAN))) |
                                     _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32((int)MAX(last, 0)));
            score[i] = _mm512_mask_blend_ps(hidden, score[i], _mm512_set1_ps(-INFINITY));
        }
    }
    const __m512 greatest = _mm512_max_ps(_mm512_max_ps(score[0], score[1]), _mm512_max_ps(score[2], score[3]));
    const float before = query->best[row], best = MAX(before, factor * _mm512_reduce_max_ps(greatest));
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < 4; i++) {
        const __m512 share = power_of_two(_mm512_fmsub_ps(score[i], _mm512_set1_ps(factor), _mm512_set1_ps(best)));
        sum = _mm512_add_ps(sum, share);
        store_bf16(shares + 16 * i, share);
    }
    if (best > before) {
        const __m512 shrink = power_of_two(_mm512_set1_ps(before - best));
        query->weights[row] *= _mm512_cvtss_f32(shrink);
        for (i64 i = 0; i < size; i += 16) {
            float *part = query->sums + row * size + i;
            _mm512_store_ps(part, _mm512_mul_ps(_mm512_load_ps(part), shrink));
        }
        query->best[row] = best;
    }
    query->weights[row] += _mm512_reduce_add_ps(sum);
}

static void add_values(const Query *query, Unit unit, i64 tiles, const bf16 *shares) {
    const i64 size = query->job->contexts->size, columns = size / 16;
    LOAD(4, shares, 2 * SPAN);
    if (tiles > 2) LOAD(5, shares + 32, 2 * SPAN);
    for (i64 column = 0; column < columns; column++) {
        float *sums = query->sums + unit.row * size + 16 * column;
        LOAD(0, sums, 4 * size);
        LOAD(6, query->values + column * 512, 64);
        MULTIPLY_ADD(0, 4, 6);
        if (tiles > 2) {
            LOAD(7, query->values + (columns + column) * 512, 64);
            MULTIPLY_ADD(0, 5, 7);
        }
        STORE(0, sums, 4 * size);
    }
}

// Rows `begin` to `end` against tokens `from` to `to` of a slot. Each stage is done for some units
// before the next, so that none waits for what it has just written.
static void attend(const Query *query, i64 begin, i64 end, i64 slot, i64 from, i64 to) {
    const i64 window = query->job->contexts->window;
    // Rows are in the order of their positions: the first sees least far ahead, and farthest back. Spans begin at the
    // same positions whatever is computed together, so that sums are the same.
    if (window) from = MAX(from, (query->positions[begin] - window + 1) / SPAN * SPAN);
    to = MIN(to, query->positions[end - 1] + 1);
    int configured = 0;
    for (; from < to; from += SPAN) {
        const i64 until = MIN(to, from + SPAN), tiles = (until - from + 15) / 16;
        if (query->leads) look_ahead(query->job, query->head, slot, until, to);
        fetch(query, slot, from, until);
        i64 next = begin;
        while (next < end) {
            Unit units[MOST_UNITS];
            int count = 0;
            for (; next < end && count < MOST_UNITS; next += 16) {
                const int rows = (int)MIN(16, end - next);
                if (query->positions[next + rows - 1] < from) continue;
                if (window && query->positions[next] - window + 1 >= from + SPAN) continue;
                units[count++] = (Unit){next, rows};
            }
            for (int i = 0; i < count; i++) {
                if (units[i].rows != configured) configure_rows(units[i].rows, units[i].rows);
                configured = units[i].rows;
                score(query, units[i], tiles, query->scores + i * 16 * SPAN);
            }
            for (int i = 0; i < count; i++)
                for (int row = 0; row < units[i].rows; row++)
                    weigh(query, units[i].row + row, from, until, query->scores + (16 * i + row) * SPAN,
                          query->shares + (16 * i + row) * SPAN);
            for (int i = 0; i < count; i++) {
                if (units[i].rows != configured) configure_rows(units[i].rows, units[i].rows);
                configured = units[i].rows;
                add_values(query, units[i], tiles, query->shares + i * 16 * SPAN);
            }
        }
    }
}

static i64 rows_of(const Attention *job, const int32_t *task) {
    i64 tokens = 0;
    for (int i = 0; i < task[TASK_COUNT]; i++) tokens += job->contexts->runs[(task[TASK_RUN] + i) * RUN_FIELDS + RUN_COUNT];
    return tokens * (job->contexts->heads / job->contexts->kv_heads);
}

// Copies the queries of a run to their rows, or what came of them from there.
static void copy_rows(const Query *query, const int32_t *run, i64 row, int back) {
    const Attention *job = query->job;
    const i64 size = job->contexts->size, group = job->contexts->heads / job->contexts->kv_heads;
    for (i64 token = 0; token < run[RUN_COUNT]; token++) {
        for (i64 i = 0; i < group; i++, row++) {
            const i64 place = ((run[RUN_TOKEN] + token) * job->contexts->heads + query->head * group + i) * size;
            query->positions[row] = run[RUN_POSITION] + token;
            if (!back) {
                memcpy(query->q + row * size, job->q + place, (size_t)size * sizeof(bf16));
                continue;
            }
            const __m512 weight = _mm512_set1_ps(query->weights[row]);
            for (i64 d = 0; d < size; d += 16)
                store_bf16(job->out + place + d, _mm512_div_ps(_mm512_load_ps(query->sums + row * size + d), weight));
        }
    }
}

static void attention_of_head(const Attention *job, const int32_t *task, i64 head, int leads, char *memory) {
    const int32_t *runs = job->contexts->runs + task[TASK_RUN] * RUN_FIELDS;
    const i64 rows = rows_of(job, task), group = job->contexts->heads / job->contexts->kv_heads;
    Query query = {.job = job, .head = head, .leads = leads};
    lay_out(&query, memory, rows, job->contexts->size);
    i64 row = 0;
    for (int i = 0; i < task[TASK_COUNT]; row += runs[i++ * RUN_FIELDS + RUN_COUNT] * group)
        copy_rows(&query, runs + i * RUN_FIELDS, row, 0);
    memset(query.sums, 0, (size_t)(rows * job->contexts->size) * sizeof(float));
    for (row = 0; row < rows; row++) query.best[row] = -1e30f, query.weights[row] = 0;
    if (task[TASK_SHARED]) attend(&query, 0, rows, runs[RUN_SLOT], 0, task[TASK_SHARED]);
    row = 0;
    for (int i = 0; i < task[TASK_COUNT]; i++) {
        const int32_t *run = runs + i * RUN_FIELDS;
        const i64 end = row + run[RUN_COUNT] * group;
        attend(&query, row, end, run[RUN_SLOT], task[TASK_SHARED], run[RUN_POSITION] + run[RUN_COUNT]);
        copy_rows(&query, run, row, 1);
        row = end;
    }
}

static void attention_task(void *shared, i64 index, char *memory) {
    const Attention *job = shared;
    const i64 parts = job->contexts->kv_heads / job->together, first = index % parts * job->together;
    const int32_t *task = job->contexts->tasks + index / parts * TASK_FIELDS;
    if (index + 1 < parts * job->contexts->num_tasks) {
        const int32_t *next = job->contexts->tasks + (index + 1) / parts * TASK_FIELDS;
        const int32_t *run = job->contexts->runs + next[TASK_RUN] * RUN_FIELDS;
        look_ahead(job, (index + 1) % parts * job->together, run[RUN_SLOT], 0, run[RUN_POSITION] + run[RUN_COUNT]);
    }
    for (i64 i = 0; i < job->together; i++) attention_of_head(job, task, first + i, !i, memory);
}

int treadle_attention(const Contexts *contexts, const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out) {
    // Key/value heads of a token lie side by side: one thread reads them all, if there is enough else to do.
    const int all = contexts->num_tasks >= 4 * max_threads() && contexts->kv_heads <= MOST_TOGETHER;
    Attention job = {q, keys, values, out, contexts, all ? contexts->kv_heads : 1};
    Query query;
    i64 most = 0;
    for (i64 i = 0; i < contexts->num_tasks; i++) most = MAX(most, rows_of(&job, contexts->tasks + i * TASK_FIELDS));
    const i64 count = contexts->num_tasks * (contexts->kv_heads / job.together);
    return run(attention_task, &job, count, 4, lay_out(&query, NULL, most, contexts->size));
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
    bf16 *x, *h, *qkv, *q, *attended, *gated;
} Pass;

// Takes x through all layers: in the end h is what the last one adds to x.
int treadle_layers(const Layer *layers, i64 count, const Pass *pass, const Contexts *contexts) {
    const i64 tokens = pass->tokens, hidden = pass->hidden;
    int ok = treadle_norm(pass->x, NULL, layers->attention_norm, pass->h, tokens, hidden, pass->eps);
    for (i64 i = 0; i < count && ok; i++) {
        const Layer *layer = layers + i;
        bf16 *keys = pass->kv + i * pass->layer_stride, *values = keys + pass->side_stride;
        ok = treadle_linear(layer->qkv, pass->h, pass->qkv, tokens, 0) &&
             treadle_norm_rope_write(pass->qkv, layer->q_norm, layer->k_norm, pass->eps, pass->cos, pass->sin, keys,
                                     values, pass->places, pass->q, tokens, contexts->heads, contexts->kv_heads,
                                     contexts->size) &&
             treadle_attention(contexts, pass->q, keys, values, pass->attended) &&
             treadle_linear(layer->o, pass->attended, pass->h, tokens, 0) &&
             treadle_norm(pass->h, pass->x, layer->mlp_norm, pass->h, tokens, hidden, pass->eps) &&
             treadle_linear(layer->gated, pass->h, pass->gated, tokens, 0) &&
             treadle_linear(layer->down, pass->gated, pass->h, tokens, 0) &&
             (i + 1 == count ||
              treadle_norm(pass->h, pass->x, layer[1].attention_norm, pass->h, tokens, hidden, pass->eps));
    }
    return ok;
}
