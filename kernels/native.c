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
    i64 count, next;
    size_t bytes;
    int failed;
} Loop;

static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);

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
    if (!reserve(loop->bytes)) {
        loop->failed = 1;
        return;
    }
    __asm__ volatile("sttilecfg %0" : "=m"(before));
    for (;;) {
        const i64 index = __atomic_fetch_add(&loop->next, 1, __ATOMIC_RELAXED);
        if (index >= loop->count) break;
        loop->work(loop->job, index, scratch);
    }
    configure(&before);
}

// Calls work(job, 0 .. count - 1, memory), each once, with `bytes` of memory for each thread. 0 if there was not enough.
static int run(void (*work)(void *, i64, char *), void *job, i64 count, size_t bytes) {
    Loop loop = {work, job, count, 0, bytes, 0};
    gomp_parallel(take_part, &loop, count > 1 ? 0 : 1, 0);
    return !loop.failed;
}

// Asks the system for the use of tiles. 0 if it refuses.
int treadle_begin(void *parallel) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    gomp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
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
enum { PREFETCH = 4096 };  // bytes ahead of what is read once, from memory

typedef struct {
    i64 format, in, out;
    const uint8_t *blocks;
    const bf16 *bias;
} Weight;

typedef struct {
    const Weight *weight;
    const bf16 *x;
    void *out;
    i64 tokens;
    int wide;
    i64 columns;  // pairs of 16 outputs in a task
} Product;

static void prefetch(const uint8_t *from, i64 bytes) {
    for (i64 i = 0; i < bytes; i += 64) _mm_prefetch((const char *)from + PREFETCH + i, _MM_HINT_T0);
}

// Puts 16 outputs of a token where they belong.
static inline void put(const Product *product, i64 token, i64 output, __m512 sum) {
    const Weight *weight = product->weight;
    const i64 to = token * weight->out + output;
    if (weight->bias) sum = _mm512_add_ps(sum, load_bf16(weight->bias + output));
    if (product->wide)
        _mm512_storeu_ps((float *)product->out + to, sum);
    else
        store_bf16((bf16 *)product->out + to, sum);
}

// Many tokens: weights expanded to tiles of bfloat16.

static void expand_block(const uint8_t *block, i64 format, __m512i *tile) {
    const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)block));
    const __m512 minimum = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(block + 32)));
    const __m512 digits = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int four = 0; four < 8; four++) {
        __m512 weights[4];
        if (format == INT4) {
            const __m512i codes = _mm512_loadu_si512(block + 64 + 64 * (four / 2));
#pragma GCC unroll 4
            for (unsigned i = 0; i < 4; i++)  // the permutation reads the lowest four bits of each lane
                weights[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * i + 4U * (four % 2)), digits);
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

// Two columns of 16 outputs as tiles, [in / 32, 2]. If there is only one left it is there twice.
static void expand(const Weight *weight, i64 first, i64 second, char *memory) {
    const i64 steps = weight->in / 32, size = BLOCK_BYTES[weight->format];
    for (i64 i = 0; i < 2; i++) {
        const uint8_t *block = weight->blocks + (i ? second : first) * steps * size;
        for (i64 step = 0; step < steps; step++, block += size) {
            prefetch(block, size);
            expand_block(block, weight->format, (__m512i *)(memory + 1024 * (2 * step + i)));
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
        for (int line = 0; line < 1024; line += 64) {
            _mm_prefetch((const char *)first + 2 * stride + line, _MM_HINT_T0);
            _mm_prefetch((const char *)second + 2 * stride + line, _MM_HINT_T0);
        }
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
    const i64 in = weight->in, columns = weight->out / 16, panel = 64 * in;
    const i64 begin = 2 * product->columns * index, end = MIN(begin + 2 * product->columns, columns);
    float ALIGNED sums[32 * 32];
    if (weight->format != BF16)
        for (i64 column = begin; column < end; column += 2)
            expand(weight, column, MIN(column + 1, columns - 1), memory + (column - begin) / 2 * panel);
    for (i64 token = 0; token < product->tokens; token += 32) {
        const int rows = (int)MIN(32, product->tokens - token);
        configure_rows(MIN(rows, 16), rows - 16);
        for (i64 column = begin; column < end; column += 2) {
            const int count = column + 1 < columns ? 2 : 1;
            const uint8_t *first = (const uint8_t *)memory + (column - begin) / 2 * panel, *second = first + 1024;
            if (weight->format == BF16) {
                first = weight->blocks + 32 * column * in;
                second = first + 32 * (count - 1) * in;
            }
            multiply(product->x + token * in, in, rows, first, second, weight->format == BF16 ? 1024 : 2048, sums);
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < count; i++)
                    put(product, token + row, 16 * (column + i), _mm512_load_ps(sums + 32 * row + 16 * i));
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
                                                                int rows) {
    const Product *product = &few->product;
    const i64 steps = product->weight->in / 32, size = BLOCK_BYTES[format];
    const uint8_t *block = product->weight->blocks + column * steps * size;
    const __m512i low_half = _mm512_set1_epi8(15);
    __m512 sums[FEW];
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
    for (int row = 0; row < rows; row++) put(product, row, 16 * column, sums[row]);
}

static inline __attribute__((always_inline)) void columns_of_few(const FewTokens *few, i64 index, i64 format) {
    const i64 end = MIN(2 * index + 2, few->product.weight->out / 16);
    for (i64 column = 2 * index; column < end; column++) {
        switch (few->product.tokens) {
            case 1: column_of_few(few, column, format, 1); break;
            case 2: column_of_few(few, column, format, 2); break;
            case 3: column_of_few(few, column, format, 3); break;
            case 4: column_of_few(few, column, format, 4); break;
            case 5: column_of_few(few, column, format, 5); break;
            case 6: column_of_few(few, column, format, 6); break;
            case 7: column_of_few(few, column, format, 7); break;
            case 8: column_of_few(few, column, format, 8); break;
        }
    }
}

static void few_tokens(void *job, i64 index, char *memory) {
    (void)memory;
    const FewTokens *few = job;
    if (few->product.weight->format == INT4)
        columns_of_few(few, index, INT4);
    else
        columns_of_few(few, index, INT8);
}

static int multiply_few(Product product) {
    const i64 groups = product.tokens * (product.weight->in / 32);
    if (!reserve((size_t)groups * (sizeof(Digits) + 2 * sizeof(float)))) return 0;
    Digits *digits = (Digits *)scratch;
    float *units = (float *)(digits + groups), *totals = units + groups;
    for (i64 i = 0; i < groups; i++) to_digits(product.x + 32 * i, digits + i, units + i, totals + i);
    FewTokens few = {product, digits, units, totals};
    return run(few_tokens, &few, (product.weight->out + 31) / 32, 0);
}

int treadle_linear(const Weight *weight, const bf16 *x, void *out, i64 tokens, int wide, int threads) {
    Product product = {weight, x, out, tokens, wide, 1};
    if (weight->format != BF16 && tokens <= FEW) return multiply_few(product);
    // Many tokens are read once for as many outputs as possible, which are few enough to give every thread its part.
    const i64 pairs = (weight->out + 31) / 32;
    if (tokens > 32) product.columns = MAX(1, MIN(8, pairs / (2 * threads)));
    const i64 bytes = weight->format == BF16 ? 0 : 64 * weight->in * product.columns;
    return run(many_tokens, &product, (pairs + product.columns - 1) / product.columns, (size_t)bytes);
}

// ---- What stands between products ----------------------------------------------------------------------------------

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
    if (tokens < 8) {
        for (i64 token = 0; token < tokens; token++) norm_token(&norm, token, NULL);
        return 1;
    }
    return run(norm_token, &norm, tokens, 0);
}

typedef struct {
    const bf16 *gate_up;
    bf16 *out;
    i64 size;
} Swiglu;

static void swiglu_token(void *job, i64 token, char *memory) {
    (void)memory;
    const Swiglu *swiglu = job;
    const bf16 *gates = swiglu->gate_up + 2 * token * swiglu->size, *ups = gates + swiglu->size;
    bf16 *out = swiglu->out + token * swiglu->size;
    const __m512 one = _mm512_set1_ps(1.0f);
    for (i64 i = 0; i < swiglu->size; i += 16) {
        const __m512 gate = load_bf16(gates + i);
        const __m512 divisor = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
        store_bf16(out + i, _mm512_mul_ps(_mm512_div_ps(gate, divisor), load_bf16(ups + i)));
    }
}

int treadle_swiglu(const bf16 *gate_up, bf16 *out, i64 tokens, i64 size) {
    Swiglu swiglu = {gate_up, out, size};
    if (tokens < 4) {
        for (i64 token = 0; token < tokens; token++) swiglu_token(&swiglu, token, NULL);
        return 1;
    }
    return run(swiglu_token, &swiglu, tokens, 0);
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
    if (tokens < 8) {
        for (i64 token = 0; token < tokens; token++) heads_of_token(&job, token, NULL);
        return 1;
    }
    return run(heads_of_token, &job, tokens, 0);
}

// ---- Attention -----------------------------------------------------------------------------------------------------
// One task: the queries of some tokens and of the heads that share one key/value head, against a context that is read
// from its pages 64 tokens at a time. For each query there are the greatest score so far, the sum of weights relative
// to it, and the weighted sum of values (online softmax, Milakov and Gimelshein 2018). Tokens of several calls whose
// contexts begin alike are one task: they go through that beginning together, then each through its own rest.

enum { SPAN = 64 };

typedef struct {
    const bf16 *q, *keys, *values;
    bf16 *out;
    const i64 *page_table;
    i64 pages_per_slot, page_size, heads, kv_heads, size, window;
    const int32_t *runs;
    const int32_t *tasks;
} Attention;

// A run of tokens of one call: its first token in the step, how many, its slot, and the position of the first.
enum { RUN_TOKEN, RUN_COUNT, RUN_SLOT, RUN_POSITION, RUN_FIELDS };
// A task: its first run, how many, and the tokens that their contexts share.
enum { TASK_RUN, TASK_COUNT, TASK_SHARED, TASK_FIELDS };

typedef struct {
    const Attention *job;
    i64 head, group;
    bf16 *q;         // [rows, D]
    float *sums;     // [rows, D]
    float *best;     // [rows]
    float *weights;  // [rows]
    i64 *positions;  // [rows]
    bf16 *keys;      // [D / 32, 4] tiles
    bf16 *values;    // [2, D / 16] tiles
    float *scores;   // [16, SPAN]
    bf16 *shares;    // [16, SPAN]
} Query;

static size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

static size_t lay_out(Query *query, char *memory, i64 rows, i64 size) {
    size_t at = 0;
    // Whole tiles of rows are written, whatever their number.
    const size_t padded = (size_t)(rows + 16), width = (size_t)size;
#define PLACE(field, bytes) query->field = (void *)(memory + at), at += aligned(bytes)
    PLACE(q, padded * width * sizeof(bf16));
    PLACE(sums, padded * width * sizeof(float));
    PLACE(best, padded * sizeof(float));
    PLACE(weights, padded * sizeof(float));
    PLACE(positions, padded * sizeof(i64));
    PLACE(keys, SPAN * width * sizeof(bf16));
    PLACE(values, SPAN * width * sizeof(bf16));
    PLACE(scores, 16 * SPAN * sizeof(float));
    PLACE(shares, 16 * SPAN * sizeof(bf16));
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

// Brings keys and values of up to 64 tokens of a slot into tiles; what is behind the last becomes zero.
static void fetch(const Query *query, i64 slot, i64 from, i64 to) {
    const Attention *job = query->job;
    const i64 size = job->size, row = job->kv_heads * size;
    const i64 *table = job->page_table + slot * job->pages_per_slot;
    i64 places[SPAN];
    for (i64 i = 0; i < SPAN; i++) {
        const i64 token = from + i;
        places[i] = token < to ? table[token / job->page_size] * job->page_size + token % job->page_size : -1;
        places[i] = places[i] < 0 ? -1 : places[i] * row + query->head * size;
    }
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const i64 filled = (to - from + 15) / 16;
    for (i64 part = 0; part < size / 32; part++) {
        for (i64 tile = 0; tile < filled; tile++) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++) {
                const i64 place = places[16 * tile + i];
                rows[i] = place < 0 ? _mm512_setzero_si512() : _mm512_loadu_si512(job->keys + place + 32 * part);
            }
            transpose(rows);
            __m512i *out = (__m512i *)(query->keys + (4 * part + tile) * 512);
            for (int i = 0; i < 16; i++) out[i] = rows[i];
        }
        for (i64 pair = 0; pair < 32; pair++) {
            const i64 even = places[2 * pair], odd = places[2 * pair + 1];
            const __m512i zero = _mm512_setzero_si512();
            const __m512i first = even < 0 ? zero : _mm512_loadu_si512(job->values + even + 32 * part);
            const __m512i second = odd < 0 ? zero : _mm512_loadu_si512(job->values + odd + 32 * part);
            bf16 *out = query->values + (pair / 16 * (size / 16) + 2 * part) * 512 + pair % 16 * 32;
            _mm512_store_si512(out, _mm512_permutex2var_epi16(first, low, second));
            _mm512_store_si512(out + 512, _mm512_permutex2var_epi16(first, high, second));
        }
    }
}

// Scores of up to 16 queries with the keys in tiles, as many of those as are filled.
static void score(const Query *query, i64 row, i64 filled) {
    const i64 size = query->job->size;
    CLEAR(0);
    CLEAR(1);
    CLEAR(2);
    CLEAR(3);
    for (i64 part = 0; part < size / 32; part++) {
        const bf16 *tiles = query->keys + 4 * part * 512;
        LOAD(4, query->q + row * size + 32 * part, 2 * size);
        LOAD(6, tiles, 64);
        MULTIPLY_ADD(0, 4, 6);
        if (filled > 1) {
            LOAD(7, tiles + 512, 64);
            MULTIPLY_ADD(1, 4, 7);
        }
        if (filled > 2) {
            LOAD(6, tiles + 1024, 64);
            MULTIPLY_ADD(2, 4, 6);
        }
        if (filled > 3) {
            LOAD(7, tiles + 1536, 64);
            MULTIPLY_ADD(3, 4, 7);
        }
    }
    STORE(0, query->scores, 4 * SPAN);
    STORE(1, query->scores + 16, 4 * SPAN);
    STORE(2, query->scores + 32, 4 * SPAN);
    STORE(3, query->scores + 48, 4 * SPAN);
}

// Turns the scores of a query into weights relative to its new greatest score, and what it has so far as well.
static void weigh(const Query *query, i64 row, int line, i64 from, i64 to) {
    const Attention *job = query->job;
    const i64 position = query->positions[row], size = job->size;
    const i64 first = job->window ? MAX(position - job->window + 1 - from, 0) : 0;
    const i64 last = MIN(position + 1, to) - from;
    const __m512 factor = _mm512_set1_ps(1.0f / sqrtf((float)size));
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 scores[4], greatest = _mm512_set1_ps(-1e30f);
    for (int i = 0; i < 4; i++) {
        const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(16 * i));
        const __mmask16 seen = _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32((int)MIN(first, SPAN))) &
                               _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32((int)MAX(last, 0)));
        const __m512 score = _mm512_mul_ps(_mm512_load_ps(query->scores + line * SPAN + 16 * i), factor);
        scores[i] = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), score);
        greatest = _mm512_max_ps(greatest, scores[i]);
    }
    const float before = query->best[row], best = MAX(before, _mm512_reduce_max_ps(greatest));
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < 4; i++) {
        const __m512 share = exponential(_mm512_sub_ps(scores[i], _mm512_set1_ps(best)));
        sum = _mm512_add_ps(sum, share);
        store_bf16(query->shares + line * SPAN + 16 * i, share);
    }
    if (best > before) {
        const __m512 shrink = exponential(_mm512_set1_ps(before - best));
        query->weights[row] *= _mm512_cvtss_f32(shrink);
        for (i64 i = 0; i < size; i += 16) {
            float *at = query->sums + row * size + i;
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), shrink));
        }
        query->best[row] = best;
    }
    query->weights[row] += _mm512_reduce_add_ps(sum);
}

static void add_values(const Query *query, i64 row, i64 filled) {
    const i64 size = query->job->size, tiles = size / 16;
    LOAD(4, query->shares, 2 * SPAN);
    if (filled > 2) LOAD(5, query->shares + 32, 2 * SPAN);
    for (i64 part = 0; part < tiles; part++) {
        float *at = query->sums + row * size + 16 * part;
        LOAD(0, at, 4 * size);
        LOAD(6, query->values + part * 512, 64);
        MULTIPLY_ADD(0, 4, 6);
        if (filled > 2) {
            LOAD(7, query->values + (tiles + part) * 512, 64);
            MULTIPLY_ADD(0, 5, 7);
        }
        STORE(0, at, 4 * size);
    }
}

// Rows `begin` to `end` of the queries against tokens `from` to `to` of a slot.
static void attend(const Query *query, i64 begin, i64 end, i64 slot, i64 from, i64 to) {
    const i64 window = query->job->window;
    // Rows are in the order of their positions: the first sees least far ahead, and farthest back.
    if (window) from = MAX(from, query->positions[begin] - window + 1);
    to = MIN(to, query->positions[end - 1] + 1);
    for (; from < to; from += SPAN) {
        const i64 until = MIN(to, from + SPAN), filled = (until - from + 15) / 16;
        fetch(query, slot, from, until);
        for (i64 row = begin; row < end; row += 16) {
            const int rows = (int)MIN(16, end - row);
            if (query->positions[row + rows - 1] < from) continue;
            if (window && query->positions[row] - window + 1 >= from + SPAN) continue;
            configure_rows(rows, rows);
            score(query, row, filled);
            for (int line = 0; line < rows; line++) weigh(query, row + line, line, from, until);
            add_values(query, row, filled);
        }
    }
}

static i64 rows_of(const Attention *job, const int32_t *task) {
    i64 tokens = 0;
    for (int i = 0; i < task[TASK_COUNT]; i++) tokens += job->runs[(task[TASK_RUN] + i) * RUN_FIELDS + RUN_COUNT];
    return tokens * (job->heads / job->kv_heads);
}

static void attention_task(void *shared, i64 index, char *memory) {
    const Attention *job = shared;
    const int32_t *task = job->tasks + index / job->kv_heads * TASK_FIELDS;
    const int32_t *runs = job->runs + task[TASK_RUN] * RUN_FIELDS;
    const i64 size = job->size, group = job->heads / job->kv_heads, total = rows_of(job, task);
    Query query = {.job = job, .head = index % job->kv_heads, .group = group};
    lay_out(&query, memory, total, size);
    i64 row = 0;
    for (int i = 0; i < task[TASK_COUNT]; i++) {
        const int32_t *run = runs + i * RUN_FIELDS;
        for (i64 token = 0; token < run[RUN_COUNT]; token++) {
            const i64 from = ((run[RUN_TOKEN] + token) * job->heads + query.head * group) * size;
            memcpy(query.q + row * size, job->q + from, (size_t)(group * size) * sizeof(bf16));
            for (i64 head = 0; head < group; head++) query.positions[row++] = run[RUN_POSITION] + token;
        }
    }
    memset(query.sums, 0, (size_t)(total * size) * sizeof(float));
    for (row = 0; row < total; row++) query.best[row] = -1e30f, query.weights[row] = 0;
    if (task[TASK_SHARED]) attend(&query, 0, total, runs[RUN_SLOT], 0, task[TASK_SHARED]);
    row = 0;
    for (int i = 0; i < task[TASK_COUNT]; i++) {
        const int32_t *run = runs + i * RUN_FIELDS;
        const i64 end = row + run[RUN_COUNT] * group;
        attend(&query, row, end, run[RUN_SLOT], task[TASK_SHARED], run[RUN_POSITION] + run[RUN_COUNT]);
        for (i64 first = row; row < end; row++) {
            const i64 token = run[RUN_TOKEN] + (row - first) / group, head = query.head * group + (row - first) % group;
            const __m512 weight = _mm512_set1_ps(query.weights[row]);
            for (i64 d = 0; d < size; d += 16)
                store_bf16(job->out + (token * job->heads + head) * size + d,
                           _mm512_div_ps(_mm512_load_ps(query.sums + row * size + d), weight));
        }
    }
}

int treadle_attention(const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out, const i64 *page_table,
                      i64 pages_per_slot, i64 page_size, i64 heads, i64 kv_heads, i64 size, i64 window,
                      const int32_t *runs, const int32_t *tasks, i64 num_tasks) {
    Attention job = {q,     keys,     values, out,    page_table, pages_per_slot, page_size,
                     heads, kv_heads, size,   window, runs,       tasks};
    Query query;
    i64 most = 0;
    for (i64 i = 0; i < num_tasks; i++) most = MAX(most, rows_of(&job, tasks + i * TASK_FIELDS));
    return run(attention_task, &job, num_tasks * kv_heads, lay_out(&query, NULL, most, size));
}
