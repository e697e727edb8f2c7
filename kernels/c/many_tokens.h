// Products of many tokens: weights are expanded to tiles of bfloat16, while the tiles before them are multiplied. So do
// sums become outputs: vectors and tiles have units of their own.

// From float16 to bfloat16, divided by CODED_UNIT. An exponent of 5 bits becomes one of 8 by three bits before it that
// are the same for all: 0 becomes 2^-31, which is 2^-29 of the greatest of its output or less.
static inline __m512i to_bf16(__m512h weights) {
    const __m512i moved = _mm512_mulhrs_epi16((__m512i)weights, _mm512_set1_epi16(1 << 12));  // divided by 8, rounded
    return _mm512_ternarylogic_epi32(moved, _mm512_set1_epi16((short)0x8fff), _mm512_set1_epi16(0x3000), 0xea);
}

// What is cut off towards zero first is not rounded twice: only the middle between two bfloat16 may go either way.
enum { TOWARDS_ZERO = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC };

static inline __attribute__((always_inline)) void expand_block(const uint8_t *block, i64 format, __m512i *tile) {
    const __m512i twice = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8,  //
                                           7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i both = _mm512_loadu_si512(block);
    const __m512h scale = (__m512h)_mm512_permutexvar_epi16(twice, both);
    const __m512h minimum = (__m512h)_mm512_permutexvar_epi16(_mm512_add_epi16(twice, _mm512_set1_epi16(16)), both);
    const __m512i digits = (__m512i)_mm512_cvtepi16_ph(
        _mm512_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0,  //
                         15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const int codes_of_word = format == INT4 ? 4 : 2;
#pragma GCC unroll 16
    for (int row = 0; row < 16; row++) {
        const __m512i codes = _mm512_loadu_si512(block + 64 + 64 * (row / codes_of_word));
        __m512h weights;
        if (format == INT4) {  // the permutation reads the lowest five bits of each word
            const unsigned shift = (unsigned[]){0, 8, 4, 12}[row % 4];
            weights = (__m512h)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, shift), digits);
        } else {
            const __m512i code =
                row % 2 ? _mm512_srli_epi16(codes, 8) : _mm512_and_si512(codes, _mm512_set1_epi16(255));
            weights = _mm512_cvtepu16_ph(code);
        }
        tile[row] = to_bf16(_mm512_fmadd_round_ph(weights, scale, minimum, TOWARDS_ZERO));
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

// Tokens `from` to `to` of a task, which are multiplied with a pair of columns before the next pair. `format` is that
// of the weights: BF16 if tokens before these have expanded them.
static void multiply_near(const Product *product, Pair pair, const Weights *weights, i64 from, i64 to, i64 format,
                          float *sums, Block *before) {
    const Weight *weight = product->weight;
    const i64 steps = weight->in / 32, parts = (steps + DEPTH - 1) / DEPTH;
    for (i64 part = 0; part < parts; part++) {
        for (i64 token = from; token < to; token += 32) {
            const bf16 *x = product->x + token * weight->in;
            const int rows = (int)MIN(32, to - token), below = rows > 16;
            float *block = sums + (parts > 1 ? (token - from) * 32 : 0);  // `sums` has room for all
            if (part)
                load_sums(block, below);
            else
                clear_sums();
            multiply_as(x, below ? x + 16 * weight->in : NULL, weights, steps * part / parts,
                        steps * (part + 1) / parts, token == from ? format : BF16, before);
            store_sums(block, below);
            if (part + 1 == parts) *before = (Block){product, block, pair, token, rows, 0};
        }
    }
}

static void product_task(void *job, i64 index, char *memory) {
    const Product *product = job;
    const Weight *weight = product->weight;
    const i64 from = index / product->columns * product->task_tokens;
    const i64 to = MIN(from + product->task_tokens, product->tokens), kept = to - from > NEAR ? 64 * weight->in : 0;
    const i64 begin = index % product->columns * product->task_pairs;
    const i64 end = MIN(begin + product->task_pairs, count_pairs(weight));
    float *sums = (float *)memory;
    char *expanded = memory + NEAR * 32 * sizeof(float);
    Block before = {0};
    configure_rows((int)MIN(to - from, 16), (int)MIN(to - from, 32) - 16);
    for (i64 near = from; near < to; near += NEAR)
        for (i64 i = begin; i < end; i++) {
            const Pair pair = pair_at(weight, i);
            const Weights weights = weights_of(weight, pair, expanded + (i - begin) * kept);
            const i64 format = near == from ? weight->format : BF16;
            multiply_near(product, pair, &weights, near, MIN(near + NEAR, to), format, sums, &before);
        }
    finish(&before, 32);
}
