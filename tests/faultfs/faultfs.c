/* faultfs.c - a file system (FUSE) that passes everything to a folder and fails when told to.
 *
 *   faultfs FOLDER MOUNT_POINT
 *
 * Commands come as lines on standard input; each is answered by one line on standard output
 * once it is in force. The end of input unmounts.
 *
 *   fail OP NAME ERRNO   from now on OP (read, write, sync, zero) on a file whose name ends
 *                        in NAME fails. What a failed sync should have made durable is lost:
 *                        the bytes are again what they were at the last good sync.
 *   keep OP NAME ERRNO   the same, but a failed sync loses nothing
 *   short write NAME 0   a write transfers its first 512 bytes only, the next one nothing
 *                        but ENOSPC: a disk that is full
 *   heal                 no faults any more
 *   cut                  a power cut: bytes that no good sync covers are lost in all files
 *   hits                 how many operations were made to fail
 *
 * No cache: files are opened with direct_io and attributes are not kept, so what a program
 * sees is what is in FOLDER. The size of a file is durable at once.
 */
#define FUSE_USE_VERSION 312
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define RULES_MAX 16

struct rule {
    char action[8], op[8], name[64];
    int error;
    unsigned hits;
};

/* Bytes as they were before a write that no sync covers yet; the newest first. */
struct old {
    struct old *next;
    char path[256];
    off_t offset;
    size_t bytes;
    char data[];
};

static int root;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct rule rules[RULES_MAX];
static unsigned rule_count, hits;
static struct old *olds;

static const char *inside(const char *path)
{
    return path[1] ? path + 1 : ".";
}

static int answer(int result)
{
    return result < 0 ? -errno : 0;
}

/* ---- What was not made durable --------------------------------------------------------- */

static void put_back(const struct old *o)
{
    int fd = openat(root, o->path, O_WRONLY);

    if (fd < 0)
        return;
    if (pwrite(fd, o->data, o->bytes, o->offset) != (ssize_t)o->bytes)
        perror("faultfs: cannot undo a write");
    close(fd);
}

/* Lets go of what is kept of a file (NULL: of all); `undo` puts it back first. */
static void settle(const char *path, int undo)
{
    struct old **at = &olds;

    while (*at) {
        struct old *o = *at;

        if (path && strcmp(o->path, path)) {
            at = &o->next;
            continue;
        }
        if (undo)
            put_back(o);
        *at = o->next;
        free(o);
    }
}

static void remember(const char *path, off_t offset, size_t bytes)
{
    struct old *o = calloc(1, sizeof(*o) + bytes);
    int fd = openat(root, path, O_RDONLY);
    ssize_t n = fd < 0 || !o ? -1 : pread(fd, o->data, bytes, offset);

    if (fd >= 0)
        close(fd);
    if (n < 0) {
        perror("faultfs: cannot keep the old bytes");
        abort();
    }
    o->offset = offset;
    o->bytes = bytes; /* behind the end of the file: zeroes */
    snprintf(o->path, sizeof(o->path), "%s", path);
    o->next = olds;
    olds = o;
}

/* ---- Rules ------------------------------------------------------------------------------ */

static struct rule *rule_for(const char *op, const char *path)
{
    for (unsigned i = 0; i < rule_count; i++) {
        struct rule *r = &rules[i];
        size_t have = strlen(path), want = strlen(r->name);

        if (!strcmp(r->op, op) && have >= want && !strcmp(path + have - want, r->name)) {
            r->hits++;
            hits++;
            return r;
        }
    }
    return NULL;
}

static void obey(const char *line)
{
    struct rule r = {0};

    if (!strcmp(line, "heal\n")) {
        rule_count = 0;
    } else if (!strcmp(line, "cut\n")) {
        settle(NULL, 1);
    } else if (!strcmp(line, "hits\n")) {
        printf("%u\n", hits);
        return;
    } else if (rule_count < RULES_MAX &&
               sscanf(line, "%7s %7s %63s %d", r.action, r.op, r.name, &r.error) == 4) {
        rules[rule_count++] = r;
    } else {
        printf("wrong command\n");
        return;
    }
    printf("ok\n");
}

static void *listen_to_commands(void *fuse)
{
    char line[256];

    while (fgets(line, sizeof(line), stdin)) {
        pthread_mutex_lock(&lock);
        obey(line);
        pthread_mutex_unlock(&lock);
        fflush(stdout);
    }
    fuse_exit(fuse);
    kill(getpid(), SIGTERM); /* ends the wait for a request */
    return NULL;
}

/* ---- Operations that may fail ------------------------------------------------------------ */

static int fs_read(const char *path, char *data, size_t bytes, off_t offset,
                   struct fuse_file_info *info)
{
    struct rule *r;
    ssize_t n;

    pthread_mutex_lock(&lock);
    r = rule_for("read", inside(path));
    n = r ? -r->error : pread((int)info->fh, data, bytes, offset);
    pthread_mutex_unlock(&lock);
    return n < 0 && !r ? -errno : (int)n;
}

static int fs_write(const char *path, const char *data, size_t bytes, off_t offset,
                    struct fuse_file_info *info)
{
    struct rule *r;
    ssize_t n = -1;

    pthread_mutex_lock(&lock);
    r = rule_for("write", inside(path));
    if (r && !strcmp(r->action, "short") && r->hits % 2) {
        bytes = bytes < 512 ? bytes : 512;
        r = NULL;
    }
    errno = r && r->error ? r->error : ENOSPC;
    if (!r) {
        remember(inside(path), offset, bytes);
        n = pwrite((int)info->fh, data, bytes, offset);
    }
    n = n < 0 ? -errno : n;
    pthread_mutex_unlock(&lock);
    return (int)n;
}

static int fs_fsync(const char *path, int data_only, struct fuse_file_info *info)
{
    struct rule *r;
    int result = 0;

    (void)data_only; /* nor is the folder behind it synced: a power cut is `cut` */
    (void)info;
    pthread_mutex_lock(&lock);
    r = rule_for("sync", inside(path));
    if (r)
        result = -r->error;
    if (!r || strcmp(r->action, "keep"))
        settle(inside(path), r != NULL);
    pthread_mutex_unlock(&lock);
    return result;
}

static int fs_fallocate(const char *path, int mode, off_t offset, off_t bytes,
                        struct fuse_file_info *info)
{
    struct rule *r;
    int result;

    pthread_mutex_lock(&lock);
    r = rule_for("zero", inside(path));
    if (!r && mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
        remember(inside(path), offset, (size_t)bytes);
    result = r ? -r->error : answer(fallocate((int)info->fh, mode, offset, bytes));
    pthread_mutex_unlock(&lock);
    return result;
}

/* ---- The others --------------------------------------------------------------------------- */

static int fs_getattr(const char *path, struct stat *st, struct fuse_file_info *info)
{
    (void)info;
    return answer(fstatat(root, inside(path), st, AT_SYMLINK_NOFOLLOW));
}

static int fs_open(const char *path, struct fuse_file_info *info)
{
    int fd = openat(root, inside(path), info->flags & ~(O_DIRECT | O_CREAT | O_EXCL));

    info->fh = (uint64_t)fd;
    info->direct_io = 1;
    return answer(fd);
}

static int fs_create(const char *path, mode_t mode, struct fuse_file_info *info)
{
    int fd = openat(root, inside(path), (info->flags & ~O_DIRECT) | O_CREAT, mode);

    info->fh = (uint64_t)fd;
    info->direct_io = 1;
    return answer(fd);
}

static int fs_release(const char *path, struct fuse_file_info *info)
{
    (void)path;
    return answer(close((int)info->fh));
}

static int fs_truncate(const char *path, off_t bytes, struct fuse_file_info *info)
{
    int fd = info ? (int)info->fh : openat(root, inside(path), O_WRONLY);
    int result = answer(fd < 0 ? fd : ftruncate(fd, bytes));

    if (!info && fd >= 0)
        close(fd);
    return result;
}

static int fs_unlink(const char *path)
{
    return answer(unlinkat(root, inside(path), 0));
}

static int fs_mkdir(const char *path, mode_t mode)
{
    return answer(mkdirat(root, inside(path), mode));
}

static int fs_rename(const char *from, const char *to, unsigned flags)
{
    return flags ? -EINVAL : answer(renameat(root, inside(from), root, inside(to)));
}

static int fs_chmod(const char *path, mode_t mode, struct fuse_file_info *info)
{
    (void)info;
    return answer(fchmodat(root, inside(path), mode, 0));
}

static int fs_statfs(const char *path, struct statvfs *st)
{
    (void)path;
    return answer(fstatvfs(root, st));
}

static int fs_readdir(const char *path, void *buffer, fuse_fill_dir_t fill, off_t offset,
                      struct fuse_file_info *info, enum fuse_readdir_flags flags)
{
    int fd = openat(root, inside(path), O_RDONLY | O_DIRECTORY);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *entry;

    (void)offset;
    (void)info;
    (void)flags;
    if (!dir)
        return -errno;
    while ((entry = readdir(dir)))
        fill(buffer, entry->d_name, NULL, 0, 0);
    closedir(dir);
    return 0;
}

static int fs_fsyncdir(const char *path, int data_only, struct fuse_file_info *info)
{
    (void)path;
    (void)data_only;
    (void)info;
    return 0;
}

static void *fs_init(struct fuse_conn_info *connection, struct fuse_config *config)
{
    (void)connection;
    config->use_ino = 1; /* an image is known by its inode */
    config->entry_timeout = config->attr_timeout = config->negative_timeout = 0;
    return NULL;
}

static const struct fuse_operations operations = {
    .init = fs_init,
    .getattr = fs_getattr,
    .open = fs_open,
    .create = fs_create,
    .release = fs_release,
    .read = fs_read,
    .write = fs_write,
    .fsync = fs_fsync,
    .fsyncdir = fs_fsyncdir,
    .fallocate = fs_fallocate,
    .truncate = fs_truncate,
    .unlink = fs_unlink,
    .mkdir = fs_mkdir,
    .rename = fs_rename,
    .chmod = fs_chmod,
    .statfs = fs_statfs,
    .readdir = fs_readdir,
};

int main(int argc, char **argv)
{
    char *words[] = {argv[0], "-o", "default_permissions,fsname=faultfs"};
    struct fuse_args arguments = FUSE_ARGS_INIT(3, words);
    struct fuse_loop_config *loop = fuse_loop_cfg_create();
    struct fuse *fuse;
    pthread_t thread;
    int result = 1;

    if (argc != 3 || (root = open(argv[1], O_RDONLY | O_DIRECTORY)) < 0) {
        fprintf(stderr, "faultfs: FOLDER MOUNT_POINT\n");
        return 2;
    }
    fuse = fuse_new(&arguments, &operations, sizeof(operations), NULL);
    if (!fuse || fuse_mount(fuse, argv[2]))
        return 1;
    fuse_set_signal_handlers(fuse_get_session(fuse));
    if (!pthread_create(&thread, NULL, listen_to_commands, fuse)) {
        printf("mounted\n");
        fflush(stdout);
        result = fuse_loop_mt(fuse, loop);
    }
    fuse_unmount(fuse);
    fuse_destroy(fuse);
    fuse_loop_cfg_destroy(loop);
    return result > 0 ? 0 : result;
}
