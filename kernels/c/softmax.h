// From scores to weights.

// The tokens of a span that the lanes of a unit see, counted from its begin: none where the last is before the first.
typedef struct {
    __m512i first, last;
} Sight;

// Of the tokens `from` to `to`. What a run looks at is hidden from the rows of others; -1 stands for all runs.
static Sight sight_of(const Queries *queries, i64 unit, i64 run, i64 from, i64 to) {
    const i64 window = queries->job->contexts->window;
    const __m512i runs = _mm512_load_si512(queries->runs + LANES * unit), none = _mm512_set1_epi32(-1);
    const __m512i position =
        _mm512_sub_epi32(_mm512_load_si512(queries->positions + LANES * unit), _mm512_set1_epi32((int)from));
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
    const __m512 factor = exponential(_mm512_mul_ps(_mm512_sub_ps(best, raised), _mm512_set1_ps(0.6931472f)));
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
static inline __attribute__((always_inline)) __m512 greatest_of(const float *scores, i64 token, Sight sight,
                                                                int hidden) {
    __m512 most[4];
    for (int i = 0; i < 4; i++) most[i] = _mm512_set1_ps(-INFINITY);
#pragma GCC unroll 32
    for (i64 i = 0; i < 32; i++) {
        const __m512 score = _mm512_load_ps(scores + LANES * i);
        most[i % 4] = hidden ? _mm512_mask_max_ps(most[i % 4], sees(sight, token + i), most[i % 4], score)
                             : _mm512_max_ps(most[i % 4], score);
    }
    return _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
}

// Two to the power of x in bfloat16, at most half of its last place further off than if it were rounded: 127 + x in
// 128ths has the bits of that number already, but that 2^f lies below the line from 1 to 2. Two are computed at a
// time, those of tokens with even indices in the lower halves of lanes: a lane is a pair as it is multiplied.
static const uint8_t ALIGNED below_line[128] = {
    0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 8, 8, 8, 8, 8, 8, 9,
    9, 9, 9, 9, 9, 9, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11,
    11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 10, 10, 10, 10, 10, 10, 10, 10, 10, 9, 9, 9, 9, 9, 9, 9,
    8, 8, 8, 8, 8, 7, 7, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 4, 4, 4, 3, 3, 3, 3, 2, 2, 1, 1, 1, 0,
};

// What scores are multiplied with and what is added, for tokens with even and odd indices.
typedef struct {
    __m512 factor[2], offset[2];
} Scale;

static Scale scale_of(__m512 factor, __m512 best) {
    const __m512 even = _mm512_set1_ps(128.0f), odd = _mm512_set1_ps(128.0f * 65536);
    const __m512 offset = _mm512_sub_ps(_mm512_set1_ps(127.0f), best);
    const __m512 half = _mm512_set1_ps(32768.0f);  // what is below the upper half is cut off
    return (Scale){
        {_mm512_mul_ps(factor, even), _mm512_mul_ps(factor, odd)},
        {_mm512_mul_ps(offset, even), _mm512_fmadd_ps(offset, odd, half)},
    };
}

// Weights of 32 tokens as a tile; the sums of weights with them.
static inline __attribute__((always_inline)) __m512 share(const float *scores, const Scale *scale, i64 token,
                                                          Sight sight, int hidden, bf16 *out, __m512 weight) {
    const __m512i low = _mm512_load_si512(below_line), high = _mm512_load_si512(below_line + 64);
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    __m512 sum[2] = {weight, _mm512_setzero_ps()};
    __m512i shares[16];
    for (i64 i = 0; i < 16; i++) {
        __m512i half[2];
        for (i64 odd = 0; odd < 2; odd++) {
            const __m512 score = _mm512_load_ps(scores + LANES * (2 * i + odd));
            const __mmask16 seen = hidden ? sees(sight, token + 2 * i + odd) : 0xffff;
            const __m512 scaled = _mm512_fmadd_ps(score, scale->factor[odd], scale->offset[odd]);
            half[odd] = _mm512_cvtps_epi32(_mm512_maskz_max_ps(seen, scaled, _mm512_setzero_ps()));
        }
        const __m512i line = _mm512_mask_mov_epi16(half[1], 0x55555555, half[0]);
        const __m512i below = _mm512_maskz_permutex2var_epi8(0x5555555555555555, low, line, high);
        shares[i] = _mm512_sub_epi16(line, below);
        sum[i % 2] = _mm512_dpbf16_ps(sum[i % 2], (__m512bh)shares[i], (__m512bh)ones);
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
    const Scale scale = scale_of(factor, best);
    __m512 weight = _mm512_load_ps(queries->weights + LANES * unit);
    for (i64 token = 0; token < tokens; token += 32) {
        const float *from = scores + LANES * token;
        bf16 *to = queries->shares + LANES * token;
        weight = sees_all(sight, token, token + 32) ? share(from, &scale, token, sight, 0, to, weight)
                                                    : share(from, &scale, token, sight, 1, to, weight);
    }
    _mm512_store_ps(queries->weights + LANES * unit, weight);
}
