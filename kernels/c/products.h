// Products, however many tokens there are.

// The pairs of each of the tasks that `threads` share: as many for each thread as can be.
static i64 even_pairs(i64 pairs, i64 threads, i64 most) {
    i64 best = 1, longest = pairs;
    for (i64 each = 1; each <= MIN(pairs / (3 * threads), most); each++) {
        const i64 tasks = (pairs + each - 1) / each, share = (tasks + threads - 1) / threads * each;
        if (share <= longest) best = each, longest = share;
    }
    return best;
}

// Divides a product into tasks. Many tokens are divided among threads, so that each finds in its caches what it made of
// its own; it expands weights that others expand as well. Of few tokens, weights are divided.
static void divide(Product *product) {
    const i64 tokens = product->tokens, threads = max_threads(), pairs = count_pairs(product->weight);
    const i64 most = KEPT_BYTES / (64 * product->weight->in);
    const i64 parts = tokens > NEAR ? MIN(threads, tokens / LEAST_OWN) : 1;
    product->task_tokens = (tokens + 32 * parts - 1) / (32 * parts) * 32;
    product->task_pairs =
        tokens > NEAR ? even_pairs(pairs, threads / parts, most) : MAX(1, MIN(pairs / (4 * threads), most));
    product->columns = (pairs + product->task_pairs - 1) / product->task_pairs;
}

// The product of tiles with a weight.
static int multiply_tiles(const Weight *weight, const bf16 *x, void *out, i64 tokens, int form) {
    Product product = {.weight = weight, .x = x, .out = out, .tokens = tokens, .form = form};
    if (weight->format != BF16 && tokens <= FEW) return multiply_few(product);
    if (!tokens) return 1;
    divide(&product);
    const i64 rows = (tokens + product.task_tokens - 1) / product.task_tokens;
    const i64 expanded = weight->format == BF16 ? 0 : 64 * weight->in;
    const i64 kept = product.task_tokens > NEAR ? product.task_pairs : 1;
    return run(product_task, &product, rows * product.columns, 8, (size_t)(NEAR * 32 * 4 + expanded * kept), OWN);
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
