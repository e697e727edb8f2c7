// Products of a few tokens: codes times inputs in 16 bits, exactly.
//
// 16 bits of what is greatest in 32 inputs are more than the 8 of bfloat16, and products of bytes are the fastest: each
// input is 256 * high + low.

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
    const __m128i order = _mm_set_epi8(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0);  // that of codes
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < 2; i++) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(value[i], factor));
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
        const __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8));
        _mm_storeu_si128((__m128i *)(digits->high + 16 * i), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(high), order));
        _mm_storeu_si128((__m128i *)(digits->low + 16 * i), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(low), order));
        sum = _mm512_add_epi32(sum, whole);
    }
    // What is not finite makes the unit, and with it the result, not a number.
    const __m512 sound = _mm512_mul_ps(_mm512_add_ps(value[0], value[1]), _mm512_setzero_ps());
    *unit = greatest / (32512.0f * CODED_UNIT) + _mm512_reduce_add_ps(sound);
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
    return run(few_tokens, &few, count_pairs(product.weight), 2, 0, OWN);
}
