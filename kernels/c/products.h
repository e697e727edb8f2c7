// Products, however many tokens there are.

// The pairs of a task: a quarter of a thread's; where there are many tokens up to a third, so that no thread has more
// of them than it must.
static i64 pairs_of_task(const Weight *weight, i64 tokens) {
    const i64 pairs = count_pairs(weight), threads = max_threads(), kept = KEPT_BYTES / (64 * weight->in);
    if (tokens <= NEAR) return MAX(1, MIN(pairs / (4 * threads), kept));
    i64 best = 1, longest = pairs;
    for (i64 each = 1; each <= MIN(pairs / (3 * threads), kept); each++) {
        const i64 tasks = (pairs + each - 1) / each, most = (tasks + threads - 1) / threads * each;
        if (most <= longest) best = each, longest = most;
    }
    return best;
}

// The product of tiles with a weight.
static int multiply_tiles(const Weight *weight, const bf16 *x, void *out, i64 tokens, int form) {
    if (weight->format != BF16 && tokens <= FEW) return multiply_few((Product){weight, x, out, tokens, 1, form});
    const i64 pairs = count_pairs(weight), bytes = weight->format == BF16 ? 0 : 64 * weight->in;
    const i64 together = pairs_of_task(weight, tokens);
    Product product = {weight, x, out, tokens, together, form};
    return run(product_task, &product, (pairs + together - 1) / together, 8,
               (size_t)(NEAR * 32 * 4 + bytes * (tokens > NEAR ? together : 1)));
}

int treadle_linear(const Weight *weight, const bf16 *x, void *out, i64 tokens, int wide) {
    bf16 *tiles = aligned_alloc(64, (size_t)((tokens + 16) / 16 * 32 * weight->in));
    if (!tiles) return 0;
    for (i64 token = 0; token < tokens; token++)
        for (i64 at = 0; at < weight->in; at += 32)
            memcpy(tiles + tile_place(token, at, weight->in), x + token * weight->in + at, 64);
    const int ok = multiply_tiles(weight, tiles, out, tokens, wide ? WIDE_ROWS : ROWS);
    free(tiles);
    return ok;
}
