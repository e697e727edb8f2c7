// Attention to contexts in pages.

// Scores of the keys of a span with a unit.
static void score(const Queries *queries, i64 unit, const Keys *keys, float *scores) {
    const Contexts *contexts = queries->job->contexts;
    const i64 size = contexts->size, stride = contexts->kv_heads * size * (i64)sizeof(bf16);
    clear_sums();
    for (i64 head = first_head(queries, unit); head <= last_head(queries, unit); head++) {
        const bf16 *q = q_of(queries, unit, head);
        for (i64 at = head * size; at < (head + 1) * size; at += 32, q += 512) {
            LOAD(4, q, 64);
            LOAD(5, keys->tiles[0] + at, stride);
            MULTIPLY_ADD(0, 5, 4);
            LOAD(6, keys->tiles[1] + at, stride);
            MULTIPLY_ADD(1, 6, 4);
            LOAD(5, keys->tiles[2] + at, stride);
            MULTIPLY_ADD(2, 5, 4);
            LOAD(6, keys->tiles[3] + at, stride);
            MULTIPLY_ADD(3, 6, 4);
        }
    }
    STORE(0, scores, 64);
    STORE(1, scores + 256, 64);
    STORE(2, scores + 512, 64);
    STORE(3, scores + 768, 64);
}

// Adds the values of a span to what a unit has.
static void add_values(const Queries *queries, i64 unit, i64 tokens) {
    const i64 size = queries->job->contexts->size;
    LOAD(4, queries->shares, 64);
    if (tokens > 32) LOAD(5, queries->shares + 512, 64);
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
            STORE(0, sums, 64);
            STORE(1, sums + 256, 64);
        }
    }
}

// A unit, and what its rows see of a span.
typedef struct {
    i64 unit;
    Sight sight;
} Seeing;

// The next unit of which a row sees something of a span; the number of units if there is none.
static Seeing next_seeing(const Queries *queries, i64 unit, i64 run, i64 from, i64 to) {
    Seeing next = {.unit = unit};
    for (; next.unit < queries->units; next.unit++) {
        next.sight = sight_of(queries, next.unit, run, from, to);
        if (sees_any(next.sight)) break;
    }
    return next;
}

// A task's queries and a stretch. `next` is read ahead after the last span.
static void attend(const Queries *queries, Stretch stretch, const Places *next) {
    Places places[2];
    find_places(queries->job, queries->head, stretch, places);
    for (int at = 0; stretch.from < stretch.to; at ^= 1) {
        const i64 from = stretch.from, until = MIN(stretch.to, from + SPAN), tokens = (until - from + 31) / 32 * 32;
        stretch.from = until;
        if (until < stretch.to) find_places(queries->job, queries->head, stretch, places + (at ^ 1));
        const Keys keys = find_keys(queries, places + at);
        // A unit is scored before the one before it is weighed, the first before values are brought: nothing waits
        // for what has just been written.
        float *scores = queries->scores, *others = queries->scores + SPAN * LANES;
        Seeing one = next_seeing(queries, 0, stretch.run, from, until);
        if (one.unit < queries->units) score(queries, one.unit, &keys, scores);
        fetch_values(queries, places + at, until < stretch.to ? places + (at ^ 1) : next, tokens);
        while (one.unit < queries->units) {
            const Seeing other = next_seeing(queries, one.unit + 1, stretch.run, from, until);
            if (other.unit < queries->units) score(queries, other.unit, &keys, others);
            weigh(queries, one.unit, tokens, scores, one.sight);
            add_values(queries, one.unit, tokens);
            float *done = scores;
            scores = others, others = done, one = other;
        }
    }
}

static void attention_task(void *shared, i64 index, char *memory) {
    const Attention *job = shared;
    const Contexts *contexts = job->contexts;
    const i64 parts = contexts->kv_heads / job->together, next = MIN(index + 1, parts * contexts->num_tasks - 1);
    const int32_t *task = contexts->tasks + index / parts * TASK_FIELDS;
    const int32_t *after = contexts->tasks + next / parts * TASK_FIELDS;
    Queries queries = {.job = job, .head = index % parts * job->together};
    lay_out(&queries, memory, rows_of(contexts, task));
    configure_rows(16, 16);
    name_rows(&queries, contexts->runs + task[TASK_RUN] * RUN_FIELDS, task[TASK_COUNT]);
    copy_queries(&queries);
    memset(queries.sums, 0, (size_t)(queries.units * queries.most * contexts->size * LANES) * sizeof(float));
    for (i64 run = first_run(task); run < task[TASK_COUNT]; run++) {
        Places places;
        if (run + 1 < task[TASK_COUNT])
            find_places(job, queries.head, stretch_of(contexts, task, run + 1), &places);
        else
            find_places(job, next % parts * job->together, stretch_of(contexts, after, first_run(after)), &places);
        attend(&queries, stretch_of(contexts, task, run), &places);
    }
    copy_results(&queries);
}

// Key/value heads of a token lie side by side. A thread reads them all for few queries, if no other waits for it then;
// for many, those of a head stay in the first level of caches.
static i64 heads_of_task(const Contexts *contexts) {
    const i64 tasks = contexts->num_tasks, threads = max_threads();
    i64 rows = 0;
    for (i64 i = 0; i < tasks; i++) rows += rows_of(contexts, contexts->tasks + i * TASK_FIELDS);
    const int few = rows < 3 * LANES * tasks && contexts->kv_heads <= MOST_TOGETHER;
    const int even = tasks % threads == 0 || tasks >= 4 * threads;
    return few && even ? contexts->kv_heads : 1;
}

static int attend_all(const Contexts *contexts, const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out,
                      int form) {
    Attention job = {q, keys, values, out, contexts, heads_of_task(contexts), form};
    Queries queries = {.job = &job};
    size_t most = 0;
    for (i64 i = 0; i < contexts->num_tasks; i++)
        most = MAX(most, lay_out(&queries, NULL, rows_of(contexts, contexts->tasks + i * TASK_FIELDS)));
    // Calls that decode take like times; pieces of prompts, whose heads are apart, do not.
    const Whose first = job.together > 1 ? OWN : ANY;
    return run(attention_task, &job, contexts->num_tasks * (contexts->kv_heads / job.together), 4, most, first);
}

int treadle_attention(const Contexts *contexts, const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out) {
    return attend_all(contexts, q, keys, values, out, ROWS);
}
