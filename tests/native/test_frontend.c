/* Front end commands that come while requests are in flight, and while answers are not yet
 * shown to the driver. The reactor's parts are called by hand, so that what happens in between
 * is exact; the protocol as a whole is tested from outside.
 */
#include "support.h"

#include <linux/virtio_blk.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "reactor.h"

#define RING_SIZE 512u
#define GUEST_BYTES (1u << 20)
/* Guest addresses; user addresses are the same plus USER. */
#define DESC 0u
#define AVAIL 0x4000u
#define USED 0x6000u
#define BUFFERS 0x10000u
#define USER 0x40000000u

struct scene {
    struct bench bench;
    struct reactor *reactor;
    struct blk *blk;
    struct ring *ring;
    int memory_fd;
    uint8_t *guest;             /* the driver's view */
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    uint64_t token;
};

static struct command *command(struct scene *s, enum command_kind kind)
{
    struct command *c = calloc(1, sizeof(*c));

    check(c);
    c->kind = kind;
    c->token = ++s->token;
    c->fd = -1;
    return c;
}

/* Queues it; true: it is answered already. */
static bool give(struct scene *s, struct command *c)
{
    blk_command(s->blk, c);
    while (blk_step(s->blk))
        ;
    return s->blk->command_first == NULL;
}

static void value(struct scene *s, enum command_kind kind, uint64_t v)
{
    struct command *c = command(s, kind);

    c->value = v;
    assert_true(give(s, c));
}

static bool share(struct scene *s, uint64_t guest)
{
    core_region r = {.guest_addr = guest, .user_addr = USER, .size = GUEST_BYTES,
                     .fd = s->memory_fd};
    struct command *c = command(s, COMMAND_MEMORY);
    char text[CORE_TEXT_MAX];

    assert_int_equal(memory_create(&r, 1, &c->memory, text), 0);
    return give(s, c);
}

static bool share_inflight(struct scene *s, int fd, uint32_t queue_size)
{
    struct command *c = command(s, COMMAND_INFLIGHT);
    char text[CORE_TEXT_MAX];

    assert_int_equal(mapping_create(fd, inflight_queue_bytes(queue_size), &c->mapping, text), 0);
    c->queues = 1;
    c->queue_size = queue_size;
    return give(s, c);
}

static void start_ring(struct scene *s)
{
    struct command *c = command(s, COMMAND_ADDR);

    value(s, COMMAND_SIZE, RING_SIZE);
    c->desc = USER + DESC;
    c->avail = USER + AVAIL;
    c->used = USER + USED;
    assert_true(give(s, c));
    assert_true(give(s, command(s, COMMAND_KICK)));
    assert_true(s->ring->running);
}

static int setup(void **state)
{
    struct scene *s = calloc(1, sizeof(*s));
    struct core *c = core_alloc(1);
    struct reactor *r;

    check(s && c);
    r = &c->reactor[0];
    bench_start(&s->bench, 8u << 20, 8u << 20, 0);
    bench_kill(&s->bench);
    c->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    r->now_ns = r->group->now_ns = 1;
    assert_int_equal(group_open(r->group, &s->bench.config, &s->bench.disk.disk, s->bench.text),
                     0);
    assert_int_equal(group_start(r->group, -1, true), 0);
    r->disk = r->group->disk;
    for (uint32_t i = 0; i < BENCH_DISKS; i++)
        blk_init(&c->blk[i], r, i);
    s->reactor = r;
    s->blk = &c->blk[0];
    s->ring = &s->blk->ring[0];
    s->memory_fd = memory_file(GUEST_BYTES);
    s->guest = mmap(NULL, GUEST_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, s->memory_fd, 0);
    check(s->guest != MAP_FAILED);
    s->desc = (struct vring_desc *)(s->guest + DESC);
    s->avail = (struct vring_avail *)(s->guest + AVAIL);
    s->used = (struct vring_used *)(s->guest + USED);
    value(s, COMMAND_FEATURES, BLK_F_FLUSH);
    assert_true(share(s, 0));
    *state = s;
    return 0;
}

static void settle(struct scene *s)
{
    bool moved = true;

    while (moved) {
        moved = disk_reap(&s->bench.disk.disk, false) > 0;
        while (group_step(s->reactor->group))
            moved = true;
        while (blk_step(s->blk))
            moved = true;
        ring_publish(s->ring);
        moved |= s->bench.disk.first && !s->bench.disk.hold;
    }
}

static int teardown(void **state)
{
    struct scene *s = *state;
    struct reactor *r = s->reactor;
    core_event event;

    s->bench.disk.hold = false;
    settle(s);
    for (uint32_t i = 0; i < BENCH_DISKS; i++)
        blk_free(&r->core->blk[i]);
    group_close(r->group);
    while (core_next_event(r->core, &event))
        ;
    close(r->core->event_fd);
    core_free(r->core);
    munmap(s->guest, GUEST_BYTES);
    close(s->memory_fd);
    bench_end(&s->bench);
    free(s);
    return 0;
}

/* The answer to the latest command; there must be one. */
static core_event answer(struct scene *s)
{
    core_event event, found = {0};

    while (core_next_event(s->reactor->core, &event))
        if (event.type == CORE_EVENT_DONE && event.token == s->token)
            found = event;
    assert_int_equal(found.type, CORE_EVENT_DONE);
    return found;
}

static uint64_t buffer(uint32_t head)
{
    return BUFFERS + (uint64_t)head * 1024;
}

static uint8_t *status_of(struct scene *s, uint32_t head)
{
    return s->guest + buffer(head) + 1000;
}

/* Header, 512 bytes for the kinds that have data, status; from descriptor `head` on. */
static void submit(struct scene *s, uint32_t head, uint32_t type, uint64_t sector)
{
    struct virtio_blk_outhdr header = {.type = type, .sector = sector};
    bool data = type != VIRTIO_BLK_T_FLUSH;
    uint16_t in = type == VIRTIO_BLK_T_IN ? VRING_DESC_F_WRITE : 0;

    memcpy(s->guest + buffer(head), &header, sizeof(header));
    *status_of(s, head) = 0xee;
    s->desc[head] = (struct vring_desc){.addr = buffer(head), .len = sizeof(header),
                                        .flags = VRING_DESC_F_NEXT,
                                        .next = (uint16_t)(head + (data ? 1 : 2))};
    s->desc[head + 1] = (struct vring_desc){.addr = buffer(head) + 16, .len = 512,
                                            .flags = VRING_DESC_F_NEXT | in,
                                            .next = (uint16_t)(head + 2)};
    s->desc[head + 2] = (struct vring_desc){.addr = buffer(head) + 1000, .len = 1,
                                            .flags = VRING_DESC_F_WRITE};
    s->avail->ring[s->avail->idx % RING_SIZE] = (uint16_t)head;
    s->avail->idx++;
    ring_poll(s->ring, 64);
}

static void promote(struct scene *s)
{
    struct verb v = {.kind = VERB_PROMOTE, .token = ++s->token};

    assert_int_equal(checkpoint_submit(s->reactor->group, &v), 0);
    settle(s);
    assert_int_equal(answer(s).result, 0);
}

/* A flush waits for a commit that the disk holds up. */
static void begin_flush(struct scene *s, uint32_t head)
{
    promote(s);
    start_ring(s);
    submit(s, 0, VIRTIO_BLK_T_OUT, 0);
    ring_publish(s->ring);
    s->bench.disk.hold = true;
    submit(s, head, VIRTIO_BLK_T_FLUSH, 0);
    settle(s);
    assert_int_equal(s->used->idx, 1);
    assert_int_equal(s->ring->inflight, 1);
}

static void a_flush_outlives_its_memory_table(void **state)
{
    struct scene *s = *state;

    begin_flush(s, 8);
    assert_true(share(s, 0)); /* the old mapping is gone now */
    s->bench.disk.hold = false;
    settle(s);
    assert_int_equal(s->used->idx, 2);
    assert_int_equal(*status_of(s, 8), VIRTIO_BLK_S_OK);
    assert_int_equal(s->ring->inflight, 0);
}

static void a_flush_whose_memory_is_gone_writes_nothing(void **state)
{
    struct scene *s = *state;

    begin_flush(s, 8);
    assert_true(share(s, 1ull << 40)); /* the rings are found by user address still */
    s->bench.disk.hold = false;
    settle(s);
    assert_int_equal(*status_of(s, 8), 0xee);
    assert_int_equal(s->ring->inflight, 0);
}

static void a_memory_table_waits_for_reads(void **state)
{
    struct scene *s = *state;

    start_ring(s);
    memset(s->bench.disk.file[DISK_IMAGE(0)], 7, PAGE);
    s->bench.disk.hold = true;
    submit(s, 0, VIRTIO_BLK_T_IN, 0);
    assert_false(share(s, 0));
    submit(s, 8, VIRTIO_BLK_T_IN, 0); /* not taken meanwhile */
    settle(s);
    assert_int_equal(s->ring->inflight, 1);
    s->bench.disk.hold = false;
    settle(s);
    assert_int_equal(answer(s).result, 0);
    assert_int_equal(*status_of(s, 0), VIRTIO_BLK_S_OK);
    assert_int_equal(s->guest[buffer(0) + 16], 7);
    ring_poll(s->ring, 64);
    settle(s);
    assert_int_equal(*status_of(s, 8), VIRTIO_BLK_S_OK);
}

static void a_reset_does_not_wait_for_flushes(void **state)
{
    struct scene *s = *state;

    begin_flush(s, 8);
    assert_true(give(s, command(s, COMMAND_RESET)));
    assert_null(s->blk->requests);
    assert_null(s->blk->memory);
    s->bench.disk.hold = false;
    settle(s);
    assert_int_equal(*status_of(s, 8), 0xee);
    assert_int_equal(s->used->idx, 1);
}

static void a_reset_ends_a_stop_that_waits(void **state)
{
    struct scene *s = *state;

    begin_flush(s, 8);
    assert_false(give(s, command(s, COMMAND_STOP)));
    assert_true(give(s, command(s, COMMAND_RESET)));
    assert_int_equal(s->used->idx, 1);
}

static void a_reset_waits_for_reads_and_answers_none(void **state)
{
    struct scene *s = *state;

    start_ring(s);
    s->bench.disk.hold = true;
    submit(s, 0, VIRTIO_BLK_T_IN, 0);
    assert_false(give(s, command(s, COMMAND_RESET)));
    s->bench.disk.hold = false;
    settle(s);
    assert_null(s->blk->command_first);
    assert_int_equal(s->used->idx, 0);
    assert_int_equal(*status_of(s, 0), 0xee);
}

static void a_stop_answers_what_it_has_taken(void **state)
{
    struct scene *s = *state;

    start_ring(s);
    s->bench.disk.hold = true;
    submit(s, 0, VIRTIO_BLK_T_IN, 0);
    assert_false(give(s, command(s, COMMAND_STOP)));
    s->bench.disk.hold = false;
    settle(s);
    assert_int_equal(s->used->idx, 1);
    assert_int_equal(answer(s).value, 1);
}

/* Heads are noted by the size of the region that was there when they were answered. */
/* Only a driver that breaks the rules has more out than the ring holds. */
static void a_ring_that_is_full_of_waiting_requests_has_no_work(void **state)
{
    struct scene *s = *state;

    begin_flush(s, 8);
    s->avail->idx++;
    assert_true(ring_has_work(s->ring));
    s->ring->inflight += RING_SIZE - 1; /* the reactor would spin until they are answered */
    assert_false(ring_has_work(s->ring));
    s->ring->inflight -= RING_SIZE - 1;
    s->avail->idx--;
}

static void fail_journal(struct scene *s, int error)
{
    s->bench.disk.fail[DISK_JOURNAL][DISK_WRITE] = error;
}

static bool was_logged(struct scene *s, const char *text)
{
    core_event event;
    bool found = false;

    while (core_next_event(s->reactor->core, &event))
        found |= event.type == CORE_EVENT_LOG && strstr(event.text, text);
    return found;
}

/* The VMM's main loop stands still meanwhile. */
static void a_stop_waits_a_bounded_time_for_a_journal_that_fails(void **state)
{
    struct scene *s = *state;

    begin_flush(s, 8);
    assert_false(give(s, command(s, COMMAND_STOP)));
    s->reactor->now_ns = s->reactor->group->now_ns += 10 * BLK_STOP_WAIT_NS;
    settle(s); /* slow is no failure */
    assert_int_equal(s->ring->inflight, 1);
    fail_journal(s, EIO);
    s->bench.disk.hold = false;
    settle(s);
    assert_int_equal(s->ring->inflight, 0);
    assert_int_equal(s->used->idx, 2);
    assert_int_equal(*status_of(s, 8), VIRTIO_BLK_S_IOERR);
    assert_true(was_logged(s, "stopped with 1 requests"));
    assert_false(s->ring->kicked);
    fail_journal(s, 0); /* what was written is kept, and committed with the next flush */
    s->reactor->now_ns = s->reactor->group->now_ns += 2 * GROUP_RETRY_NS;
    start_ring(s);
    submit(s, 24, VIRTIO_BLK_T_FLUSH, 0);
    settle(s);
    assert_int_equal(*status_of(s, 24), VIRTIO_BLK_S_OK);
    assert_int_equal(s->reactor->group->trouble[TROUBLE_COMMIT][0], 0);
    assert_true(s->reactor->group->committed > 0);
}

static void a_stop_gives_a_failing_journal_its_time(void **state)
{
    struct scene *s = *state;

    begin_flush(s, 8);
    fail_journal(s, EIO);
    s->bench.disk.hold = false;
    assert_false(give(s, command(s, COMMAND_STOP)));
    settle(s);
    assert_int_equal(s->ring->inflight, 1);
    assert_int_equal(blk_timer(s->blk), s->reactor->group->now_ns + BLK_STOP_WAIT_NS);
    fail_journal(s, 0);
    s->reactor->now_ns = s->reactor->group->now_ns += 2 * GROUP_RETRY_NS;
    settle(s);
    assert_int_equal(s->used->idx, 2);
    assert_int_equal(*status_of(s, 8), VIRTIO_BLK_S_OK);
}

static void a_stop_waits_a_bounded_time_for_room_for_resubmits(void **state)
{
    struct scene *s = *state;
    struct group *g = s->reactor->group;
    int fd = memory_file(inflight_queue_bytes(RING_SIZE));
    struct inflight_queue *q = mmap(NULL, inflight_queue_bytes(RING_SIZE),
                                    PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    assert_ptr_not_equal(q, MAP_FAILED);
    start_ring(s);
    submit(s, 16, VIRTIO_BLK_T_OUT, 0);
    settle(s);
    assert_true(give(s, command(s, COMMAND_STOP)));
    q->version = 1;
    q->used_idx = s->used->idx;
    q->desc[16].inflight = 1;
    *status_of(s, 16) = 0xee;
    assert_true(share_inflight(s, fd, RING_SIZE));
    while (g->arena.free_count > GROUP_RESERVED_SEGMENTS)
        arena_segment_take(&g->arena, 1, SEGMENT_RAW);
    epoch_open(g)->part[0].raw.tail = SEGMENT_BYTES;
    start_ring(s);
    ring_poll(s->ring, 64);
    assert_true(s->ring->held);
    assert_false(give(s, command(s, COMMAND_STOP)));
    ring_poll(s->ring, 64);
    assert_int_equal(*status_of(s, 16), 0xee);
    s->reactor->now_ns = g->now_ns += BLK_STOP_WAIT_NS;
    settle(s);
    ring_poll(s->ring, 64);
    settle(s);
    assert_int_equal(*status_of(s, 16), VIRTIO_BLK_S_IOERR);
    assert_int_equal(s->used->idx, 2);
    assert_true(was_logged(s, "stopped with 1 requests"));
    munmap(q, inflight_queue_bytes(RING_SIZE));
    close(fd);
}

static void answers_are_noted_in_the_region_they_began_in(void **state)
{
    struct scene *s = *state;
    int large = memory_file(inflight_queue_bytes(RING_SIZE)), small = memory_file(PAGE);
    struct inflight_queue *q = mmap(NULL, inflight_queue_bytes(RING_SIZE), PROT_READ, MAP_SHARED,
                                    large, 0);

    assert_ptr_not_equal(q, MAP_FAILED);
    assert_true(share_inflight(s, large, RING_SIZE));
    start_ring(s);
    submit(s, 500, VIRTIO_BLK_T_OUT, 0);
    assert_int_equal(q->desc[500].inflight, 1); /* answered, not shown yet */
    assert_true(share_inflight(s, small, 1));
    settle(s);
    assert_int_equal(s->used->idx, 1);
    assert_int_equal(q->desc[500].inflight, 0);
    assert_int_equal(q->used_idx, 1);
    submit(s, 400, VIRTIO_BLK_T_OUT, 0); /* a head that the small one has no place for */
    settle(s);
    assert_int_equal(s->used->idx, 2);
    munmap(q, inflight_queue_bytes(RING_SIZE));
    close(large);
    close(small);
}

/* What a region said at one start is not done again at the next one. */
static void requests_found_in_flight_are_done_at_one_start_only(void **state)
{
    struct scene *s = *state;
    int old = memory_file(inflight_queue_bytes(RING_SIZE));
    int fresh = memory_file(inflight_queue_bytes(RING_SIZE));
    struct inflight_queue *q = mmap(NULL, inflight_queue_bytes(RING_SIZE),
                                    PROT_READ | PROT_WRITE, MAP_SHARED, old, 0);

    assert_ptr_not_equal(q, MAP_FAILED);
    start_ring(s); /* to have chains in the table */
    submit(s, 16, VIRTIO_BLK_T_OUT, 0);
    submit(s, 32, VIRTIO_BLK_T_OUT, 8);
    settle(s);
    assert_true(give(s, command(s, COMMAND_STOP)));
    q->version = 1;
    q->used_idx = s->used->idx;
    q->desc[16].inflight = q->desc[32].inflight = 1;
    q->desc[16].counter = 2;
    q->desc[32].counter = 1;
    s->desc[16].len = 0; /* broken: no status byte, after the older one was done */
    s->desc[16].flags = 0;
    assert_true(share_inflight(s, old, RING_SIZE));
    start_ring(s);
    ring_poll(s->ring, 64);
    settle(s);
    assert_true(s->ring->broken);
    assert_int_equal(s->used->idx, 3);
    assert_true(give(s, command(s, COMMAND_STOP)));
    assert_true(share_inflight(s, fresh, RING_SIZE));
    value(s, COMMAND_BASE, s->avail->idx);
    start_ring(s);
    ring_poll(s->ring, 64);
    settle(s);
    assert_false(s->ring->broken);
    assert_int_equal(s->used->idx, 3);
    munmap(q, inflight_queue_bytes(RING_SIZE));
    close(old);
    close(fresh);
}

static void a_call_descriptor_is_told_at_once(void **state)
{
    struct scene *s = *state;
    struct command *c = command(s, COMMAND_CALL);
    int call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    uint64_t count = 0;

    c->fd = dup(call);
    assert_true(give(s, c)); /* before the kick: the ring is not even set up */
    assert_int_equal(read(call, &count, sizeof(count)), sizeof(count));
    assert_int_equal(count, 1);
    close(call);
}

static void a_lost_dirty_log_is_told(void **state)
{
    struct scene *s = *state;
    int fd = memory_file(PAGE);
    struct command *c = command(s, COMMAND_LOG);
    char text[CORE_TEXT_MAX];
    uint32_t told = 0;
    core_event event;

    assert_int_equal(memory_handle_sigbus(), 0);
    assert_int_equal(mapping_create(fd, PAGE, &c->mapping, text), 0);
    c->bytes = PAGE;
    assert_true(give(s, c));
    value(s, COMMAND_FEATURES, BLK_F_FLUSH | BLK_F_LOG_ALL);
    start_ring(s);
    assert_int_equal(ftruncate(fd, 0), 0);
    submit(s, 0, VIRTIO_BLK_T_OUT, 0);
    settle(s);
    while (core_next_event(s->reactor->core, &event))
        told += event.type == CORE_EVENT_MEMORY_LOST;
    assert_int_equal(told, 1);
    close(fd);
}

static void the_reactor_spins_where_that_pays(void **state)
{
    uint64_t spin = 100000;

    (void)state;
    for (int i = 0; i < 10; i++) { /* requests a millisecond apart: no spin would meet them */
        uint64_t before = spin;

        spin = reactor_spin(spin, 100000, 900000);
        assert_true(spin < before || spin == SPIN_NS_MIN);
    }
    assert_int_equal(spin, SPIN_NS_MIN);
    assert_int_equal(reactor_spin(spin, 100000, 100000), SPIN_NS_MIN);
    assert_int_equal(reactor_spin(spin, 100000, 99999), 100000);
    assert_int_equal(reactor_spin(0, 0, 0), 0); /* spin-us = 0 */
    assert_int_equal(reactor_spin(0, 0, 900000), 0);
    assert_int_equal(reactor_spin(2000, 2000, 900000), 2000);
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(a_flush_outlives_its_memory_table),
        CASE(a_flush_whose_memory_is_gone_writes_nothing),
        CASE(a_memory_table_waits_for_reads),
        CASE(a_reset_does_not_wait_for_flushes),
        CASE(a_reset_ends_a_stop_that_waits),
        CASE(a_reset_waits_for_reads_and_answers_none),
        CASE(a_stop_answers_what_it_has_taken),
        CASE(a_ring_that_is_full_of_waiting_requests_has_no_work),
        CASE(a_stop_waits_a_bounded_time_for_a_journal_that_fails),
        CASE(a_stop_gives_a_failing_journal_its_time),
        CASE(a_stop_waits_a_bounded_time_for_room_for_resubmits),
        CASE(answers_are_noted_in_the_region_they_began_in),
        CASE(requests_found_in_flight_are_done_at_one_start_only),
        cmocka_unit_test(the_reactor_spins_where_that_pays),
        CASE(a_call_descriptor_is_told_at_once),
        CASE(a_lost_dirty_log_is_told),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
