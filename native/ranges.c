/* ranges.c - see ranges.h. */
#include "ranges.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#ifndef RANGES_NODE /* the simulator has smaller ones, see tests/sim */
#define RANGES_NODE 254u
#endif
#define HEIGHT_MAX 16u           /* to fill more takes longer than anybody lives */
#define MERGE_MAX 4096u
#define PLACE_MASK ((1ull << 56) - 1)

struct range_child {
    uint64_t place;              /* nothing in it begins before, nothing before it ends behind;
                                    the first one's is ignored */
    struct range_node *node;
};
_Static_assert(sizeof(struct range_child) == sizeof(struct range), "a node holds either");

struct range_node {
    uint32_t count;
    uint32_t unused[3];
    union {
        struct range range[RANGES_NODE];
        struct range_child child[RANGES_NODE];
    };
};

/* From the root to a place in a leaf. */
struct path {
    struct {
        struct range_node *node;
        uint32_t at;
    } level[HEIGHT_MAX];
    uint32_t leaf;               /* the last level */
};

static inline uint64_t place_of(uint32_t disk, uint64_t block)
{
    return ((uint64_t)disk << 48) + block; /* of a block behind the last: the next disk's first */
}

static inline uint64_t range_place(const struct range *x)
{
    return x->key & PLACE_MASK;
}

static inline uint64_t range_end(const struct range *x)
{
    return range_place(x) + x->blocks;
}

/* ---- Memory ---------------------------------------------------------------------------------- */

static void give_back(struct ranges *r, struct index_memory *m, struct range_node *node)
{
    free(node);
    r->bytes -= sizeof(*node);
    index_memory_count(m, -(int64_t)sizeof(*node));
}

/* As many nodes as one range more can need: one a level, and a root. */
static int reserve(const struct ranges *r, struct index_memory *m)
{
    while (m->spares < r->height + 1) {
        struct range_node *node = malloc(sizeof(*node));

        if (!node)
            return -ENOMEM;
        memcpy(node, &m->spare, sizeof(m->spare));
        m->spare = node;
        m->spares++;
        index_memory_count(m, (int64_t)sizeof(*node));
    }
    return 0;
}

static struct range_node *take(struct ranges *r, struct index_memory *m)
{
    struct range_node *node = m->spare;

    check(node);
    memcpy(&m->spare, node, sizeof(m->spare));
    m->spares--;
    r->bytes += sizeof(*node);
    node->count = 0;
    return node;
}

void index_memory_init(struct index_memory *m, uint64_t limit)
{
    *m = (struct index_memory){.limit = (int64_t)limit, .left = (int64_t)limit};
}

void index_memory_free(struct index_memory *m)
{
    while (m->spares > 0) {
        void *node = m->spare;

        memcpy(&m->spare, node, sizeof(m->spare));
        free(node);
        m->spares--;
        index_memory_count(m, -(int64_t)sizeof(struct range_node));
    }
    m->spare = NULL;
}

static void free_node(struct ranges *r, struct index_memory *m, struct range_node *node,
                      uint32_t height)
{
    for (uint32_t i = 0; height > 1 && i < node->count; i++)
        free_node(r, m, node->child[i].node, height - 1);
    give_back(r, m, node);
}

void ranges_free(struct ranges *r, struct index_memory *m)
{
    if (r->root)
        free_node(r, m, r->root, r->height);
    check(r->bytes == 0);
    memset(r, 0, sizeof(*r));
}

/* ---- Looking --------------------------------------------------------------------------------- */

/* The last child that begins at the place or before it. */
static uint32_t child_of(const struct range_node *node, uint64_t place)
{
    uint32_t low = 1, high = node->count;

    while (low < high) {
        uint32_t mid = (low + high) / 2;

        if (node->child[mid].place <= place)
            low = mid + 1;
        else
            high = mid;
    }
    return low - 1;
}

/* The first range of the leaf that ends behind the place; its count, if none does. */
static uint32_t range_of(const struct range_node *node, uint64_t place)
{
    uint32_t low = 0, high = node->count;

    while (low < high) {
        uint32_t mid = (low + high) / 2;

        if (range_end(&node->range[mid]) <= place)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

/* Where a range that holds the place is, or would be added. The tree is not empty. */
static void seek(const struct ranges *r, uint64_t place, struct path *p)
{
    struct range_node *node = r->root;

    p->leaf = r->height - 1;
    for (uint32_t i = 0; i < p->leaf; i++) {
        p->level[i].node = node;
        p->level[i].at = child_of(node, place);
        node = node->child[p->level[i].at].node;
    }
    p->level[p->leaf].node = node;
    p->level[p->leaf].at = range_of(node, place);
}

/* The range at the path; from the end of a leaf it moves on. NULL: there is none. */
static struct range *here(struct path *p)
{
    struct range_node *node = p->level[p->leaf].node;
    uint32_t up = p->leaf;

    if (p->level[up].at < node->count)
        return &node->range[p->level[up].at];
    do {
        if (up == 0)
            return NULL;
        up--;
        p->level[up].at++;
    } while (p->level[up].at == p->level[up].node->count);
    while (up < p->leaf) {
        node = p->level[up].node->child[p->level[up].at].node;
        up++;
        p->level[up].node = node;
        p->level[up].at = 0;
    }
    return &node->range[0];
}

static struct range *first_from(const struct ranges *r, uint64_t place, struct path *p)
{
    if (!r->root)
        return NULL;
    seek(r, place, p);
    return here(p);
}

static struct range *next(struct path *p)
{
    p->level[p->leaf].at++;
    return here(p);
}

bool ranges_cover(const struct ranges *r, uint32_t disk, uint64_t block)
{
    struct path p;
    const struct range *x = first_from(r, place_of(disk, block), &p);

    return x && range_place(x) <= place_of(disk, block);
}

/* ---- Adding ---------------------------------------------------------------------------------- */

/* An entry of either kind into a node that has room. */
static void insert_at(struct range_node *node, uint32_t at, const void *entry)
{
    memmove(&node->range[at + 1], &node->range[at], (node->count - at) * sizeof(struct range));
    memcpy(&node->range[at], entry, sizeof(struct range));
    node->count++;
}

static void insert(struct ranges *r, struct index_memory *m, struct path *p, uint32_t level,
                   const void *entry);

/* The full node at the level gets a neighbour, and the one of them the entry. What comes in order
 * leaves full nodes behind. */
static void split(struct ranges *r, struct index_memory *m, struct path *p, uint32_t level,
                  const void *entry)
{
    struct range_node *left = p->level[level].node, *right = take(r, m);
    uint32_t at = p->level[level].at, keep = at == RANGES_NODE ? at : RANGES_NODE / 2;
    struct range_child added = {.node = right};

    right->count = left->count - keep;
    memcpy(right->range, &left->range[keep], right->count * sizeof(struct range));
    left->count = keep;
    if (at < keep || (at == keep && keep < RANGES_NODE))
        insert_at(left, at, entry);
    else
        insert_at(right, at - keep, entry);
    added.place = level == p->leaf ? range_place(&right->range[0]) : right->child[0].place;
    if (level > 0) {
        p->level[level - 1].at++;
        insert(r, m, p, level - 1, &added);
        return;
    }
    r->root = take(r, m);
    r->root->child[0] = (struct range_child){.node = left};
    r->root->child[1] = added;
    r->root->count = 2;
    r->height++;
    check(r->height <= HEIGHT_MAX);
}

/* reserve() was called. */
static void insert(struct ranges *r, struct index_memory *m, struct path *p, uint32_t level,
                   const void *entry)
{
    struct range_node *node = p->level[level].node;

    if (node->count < RANGES_NODE)
        insert_at(node, p->level[level].at, entry);
    else
        split(r, m, p, level, entry);
}

static void add(struct ranges *r, struct index_memory *m, struct path *p, struct range x)
{
    if (!r->root) {
        r->root = take(r, m);
        r->height = 1;
        *p = (struct path){.level[0].node = r->root};
    }
    insert(r, m, p, p->leaf, &x);
    r->count++;
}

/* A range that lies on both sides of the place becomes two. */
static int cut(struct ranges *r, struct index_memory *m, uint64_t place, ranges_changed *changed,
               void *owner)
{
    struct path p;
    struct range *x = first_from(r, place, &p), right;
    int error;

    if (!x || range_place(x) >= place)
        return 0;
    error = reserve(r, m);
    if (error)
        return error;
    right = *x;
    right.key += place - range_place(x);
    right.blocks = (uint32_t)(range_end(x) - place);
    x->blocks -= right.blocks;
    p.level[p.leaf].at++;
    add(r, m, &p, right);
    changed(owner, right.loc, false);
    return 0;
}

/* ---- Removing -------------------------------------------------------------------------------- */

/* The empty node at the end of the path goes, and what becomes empty by that. */
static void drop(struct ranges *r, struct index_memory *m, struct path *p)
{
    uint32_t level = p->leaf;

    for (;; level--) {
        struct range_node *node = p->level[level].node, *above;
        uint32_t at;

        if (node->count > 0)
            break;
        give_back(r, m, node);
        if (level == 0) {
            r->root = NULL;
            r->height = 0;
            return;
        }
        above = p->level[level - 1].node;
        at = p->level[level - 1].at;
        memmove(&above->child[at], &above->child[at + 1],
                (above->count - at - 1) * sizeof(above->child[0]));
        above->count--;
    }
    while (r->height > 1 && r->root->count == 1) {
        struct range_node *node = r->root;

        r->root = node->child[0].node;
        r->height--;
        give_back(r, m, node);
    }
}

/* All ranges between the places; none lies across their ends. */
static void remove_all(struct ranges *r, struct index_memory *m, uint64_t place, uint64_t end,
                       ranges_changed *changed, void *owner)
{
    struct path p;
    const struct range *x;

    while ((x = first_from(r, place, &p)) && range_place(x) < end) {
        struct range_node *leaf = p.level[p.leaf].node;
        uint32_t at = p.level[p.leaf].at, to = at;

        for (; to < leaf->count && range_place(&leaf->range[to]) < end; to++)
            changed(owner, leaf->range[to].loc, true);
        memmove(&leaf->range[at], &leaf->range[to], (leaf->count - to) * sizeof(leaf->range[0]));
        leaf->count -= to - at;
        r->count -= to - at;
        if (leaf->count == 0)
            drop(r, m, &p);
    }
}

/* What is added at `from` ends at the place: no leaf behind it may say that it begins before. */
static void raise_next(const struct ranges *r, const struct path *from, uint64_t place)
{
    struct path p;

    seek(r, place, &p);
    if (p.level[p.leaf].node == from->level[from->leaf].node)
        return;
    for (uint32_t level = p.leaf; level-- > 0;)
        if (p.level[level].at > 0) {
            p.level[level].node->child[p.level[level].at].place = place;
            return;
        }
}

int ranges_put(struct ranges *r, struct index_memory *m, uint32_t disk, uint64_t first,
               uint64_t end, uint32_t flags, arena_loc loc, ranges_changed *changed, void *owner)
{
    uint64_t place = place_of(disk, first), place_end = place_of(disk, end);
    struct range put = {.key = (uint64_t)flags << 56 | place, .blocks = (uint32_t)(end - first),
                        .loc = loc};
    struct path p = {0};
    int error;

    check(first < end && end - first <= UINT32_MAX && end <= 1ull << 48);
    error = cut(r, m, place, changed, owner);
    if (!error)
        error = cut(r, m, place_end, changed, owner);
    if (!error)
        error = reserve(r, m);
    if (error)
        return error;
    remove_all(r, m, place, place_end, changed, owner);
    if (r->root) {
        seek(r, place, &p);
        raise_next(r, &p, place_end);
    }
    add(r, m, &p, put);
    return 0;
}

/* ---- Walking --------------------------------------------------------------------------------- */

uint32_t ranges_repoint(struct ranges *r, uint32_t disk, uint64_t first, uint64_t end,
                        arena_loc old, arena_loc new)
{
    struct path p;
    struct range *x = first_from(r, place_of(disk, first), &p);
    uint32_t count = 0;

    for (; x && range_place(x) < place_of(disk, end); x = next(&p))
        if (x->loc == old) {
            x->loc = new;
            count++;
        }
    return count;
}

bool ranges_left(const struct ranges *r, uint32_t disk, uint64_t first, uint64_t end,
                 arena_loc loc)
{
    struct path p;
    const struct range *x = first_from(r, place_of(disk, first), &p);

    for (uint32_t n = 0; x && range_place(x) < place_of(disk, end); x = next(&p))
        if (x->loc == loc || ++n == RANGES_LOOK_MAX)
            return true;
    return false;
}

bool ranges_next(const struct ranges *r, struct range_extent *x)
{
    struct path p;
    const struct range *at = first_from(r, place_of(x->disk, x->end), &p);
    uint64_t flags, end;

    if (!at)
        return false;
    flags = at->key >> 56;
    end = range_end(at);
    x->disk = (uint32_t)(range_place(at) >> 48);
    x->flags = (uint32_t)flags;
    x->first = range_place(at) & ((1ull << 48) - 1);
    for (uint32_t n = 0; n < MERGE_MAX; n++) {
        at = next(&p);
        if (!at || range_place(at) != end || at->key >> 56 != flags ||
            range_place(at) >> 48 != x->disk)
            break;
        end = range_end(at);
    }
    x->end = end - place_of(x->disk, 0);
    return true;
}

void ranges_each(const struct ranges *r, void (*found)(void *owner, arena_loc loc), void *owner)
{
    struct path p;

    for (const struct range *x = first_from(r, 0, &p); x; x = next(&p))
        found(owner, x->loc);
}
