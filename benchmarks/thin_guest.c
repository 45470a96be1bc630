/*
 * The guest's side of the floor in attach.py: the thinnest thing that mounts disks as they come,
 * and unmounts them and has the kernel let them go.
 *
 *     thin_guest PORT WORKERS
 *
 * The host says over the port "mount N\n", hears "ready\n", attaches N disks, and hears
 * "mounted\n" when all are. It says "release\n", and hears of each disk that is gone in the
 * guest: the PCI device and function of its controller, and its LUN, "10.0 5\n". By "delete\n"
 * the disks keep their driver until they are deleted. Nothing is looked at twice and nothing
 * is proved: what the kernel's uevents tell of is taken for the disk that is meant. Whatever
 * fails ends it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define MOST 1024
#define FOLDER "/run/thin"

struct disk {
    char node[64], address[32], delete[256], name[32], target[64];
};

typedef void job_t(struct disk *);

static struct disk disks[MOST];
static job_t *job;             /* what is done to each */
static int put, taken, done;   /* disks to do it to, begun with, done */
static int wanted;             /* disks of this round */
static int unbinding;          /* each disk loses its driver before it is deleted */
static int port;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static void fail(const char *what, const char *where)
{
    dprintf(port, "failed: %s %s: %s\n", what, where, strerror(errno));
    exit(1);
}

static void say(const char *text)
{
    if (write(port, text, strlen(text)) < 0)
        exit(1);
}

static void mount_it(struct disk *disk)
{
    if (mount(disk->node, disk->target, "ext4", 0, NULL))
        fail("mount", disk->node);
}

static void tell(const char *path, const char *order)
{
    int file = open(path, O_WRONLY);

    if (file < 0 || write(file, order, strlen(order)) < 0)
        fail(order, path);
    close(file);
}

static void release_it(struct disk *disk)
{
    if (umount2(disk->target, 0))
        fail("umount2", disk->target);
    if (unbinding)
        tell("/sys/bus/scsi/drivers/sd/unbind", disk->address);
    tell(disk->delete, "1");
    say(disk->name);
}

static void *work(void *unused)
{
    pthread_mutex_lock(&lock);
    for (;;) {
        struct disk *disk;

        while (taken == put)
            pthread_cond_wait(&changed, &lock);
        disk = &disks[taken++];
        pthread_mutex_unlock(&lock);
        job(disk);
        pthread_mutex_lock(&lock);
        if (++done == wanted && job == mount_it)
            say("mounted\n");
    }
    return unused;
}

/* "add@/devices/pci0000:00/0000:00:10.0/virtio2/host0/target0:0:0/0:0:0:5/block/sda" */
static int is_new_disk(char *event, struct disk *disk)
{
    char *path = event + 4, *block, *lun, *pci, *name;

    if (strncmp(event, "add@", 4) || !(block = strstr(path, "/block/")))
        return 0;
    name = block + 7;
    if (strncmp(name, "sd", 2) || strchr(name, '/') || !(pci = strstr(path, "/virtio")))
        return 0;
    snprintf(disk->node, sizeof disk->node, "/dev/%s", name);
    *block = '\0';
    snprintf(disk->delete, sizeof disk->delete, "/sys%s/delete", path);
    snprintf(disk->address, sizeof disk->address, "%s", strrchr(path, '/') + 1);
    lun = strrchr(path, ':') + 1;
    snprintf(disk->name, sizeof disk->name, "%.4s %s\n", pci - 4, lun);
    snprintf(disk->target, sizeof disk->target, FOLDER "/%.4s-%s", pci - 4, lun);
    mkdir(disk->target, 0700);
    return 1;
}

static int listen_to_kernel(void)
{
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK, .nl_groups = 1};
    int events = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);
    int room = 16 << 20;

    setsockopt(events, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    if (bind(events, (struct sockaddr *)&kernel, sizeof kernel))
        fail("bind", "netlink");
    return events;
}

static void begin(job_t *next, int count)
{
    pthread_mutex_lock(&lock);
    job = next;
    taken = done = 0;
    put = count;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void mount_all(int count)
{
    char event[240]; /* the rest of one, its variables, is not read */
    int events = listen_to_kernel(), heard = 0;

    wanted = count;
    begin(mount_it, 0);
    say("ready\n");
    while (heard < count) {
        ssize_t length = recv(events, event, sizeof event - 1, 0);

        if (length < 0)
            fail("recv", "netlink");
        event[length] = '\0';
        if (!is_new_disk(event, &disks[heard]))
            continue;
        pthread_mutex_lock(&lock);
        put = ++heard;
        pthread_cond_signal(&changed);
        pthread_mutex_unlock(&lock);
    }
    close(events);
}

int main(int argc, char **argv)
{
    char line[64];
    FILE *orders;
    int count, workers;

    if (argc != 3 || (port = open(argv[1], O_RDWR | O_CLOEXEC)) < 0)
        return 2;
    orders = fdopen(dup(port), "r");
    mkdir(FOLDER, 0700);
    for (workers = atoi(argv[2]); workers > 0; workers--) {
        pthread_t thread;

        if (pthread_create(&thread, NULL, work, NULL))
            fail("pthread_create", "");
    }
    while (fgets(line, sizeof line, orders)) {
        if (sscanf(line, "mount %d", &count) == 1 && count <= MOST)
            mount_all(count);
        else {
            unbinding = !strcmp(line, "release\n");
            begin(release_it, wanted);
        }
    }
    return 0;
}
