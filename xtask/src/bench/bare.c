/* The system calls of one container and nothing else: no configuration is read, no state kept, nothing checked beyond
 * failing. The floor that a runtime is measured against. What is in it is what `edged-oci spec` and the bench put into the
 * configuration, and nothing that it does not ask for. Arguments: rootfs, name, cgroup path, network namespace (1: a new
 * one, 0: none, a path: to enter), file with a seccomp filter. With a directory behind them the root is an overlay
 * (upper, work, merged in that directory), and the milliseconds from here to exec are printed. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define OR_DIE(call)                                            \
    do {                                                        \
        if ((call) == -1) {                                     \
            fprintf(stderr, "%s: %s\n", #call, strerror(errno)); \
            _exit(1);                                           \
        }                                                       \
    } while (0)

static const char *V1[] = {"cpu", "devices", "freezer", "memory", "pids"};
static char paths[5][512];
static int procs[5], groups;

static void put(const char *dir, const char *file, const char *text) {
    char path[768];
    snprintf(path, sizeof path, "%s/%s", dir, file);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    OR_DIE(fd);
    OR_DIE(write(fd, text, strlen(text)));
    close(fd);
}

static struct sock_filter filter[4096];
static struct sock_fprog program = {0, filter};

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

/* `process.capabilities`, `user` and `rlimits`. */
static void give_up_power(void) {
    static const int names[] = {CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_KILL, CAP_SETGID, CAP_SETUID,
        CAP_NET_BIND_SERVICE, CAP_SETFCAP};
    uint64_t kept = 0;
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) kept |= 1ULL << names[i];
    struct rlimit files = {1024, 1024};
    OR_DIE(setrlimit(RLIMIT_NOFILE, &files));
    for (int number = 0; number <= CAP_LAST_CAP; number++)
        if (!(kept >> number & 1)) OR_DIE(prctl(PR_CAPBSET_DROP, number, 0, 0, 0));
    OR_DIE(syscall(SYS_setgroups, 0, NULL));
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[2];
    for (int i = 0; i < 2; i++) {
        sets[i].effective = sets[i].permitted = (uint32_t)(kept >> 32 * i);
        sets[i].inheritable = 0;
    }
    OR_DIE(syscall(SYS_capset, &header, sets));
}

static void child(const char *rootfs, const char *work, int netns) {
    for (int i = 0; i < groups; i++) OR_DIE(write(procs[i], "0", 1));
    OR_DIE(setsid());
    if (netns >= 0) OR_DIE(setns(netns, CLONE_NEWNET));
    OR_DIE(unshare(CLONE_NEWCGROUP));
    OR_DIE(sethostname("edged", 5));
    OR_DIE(mount(NULL, "/", NULL, MS_SLAVE | MS_REC, NULL));
    if (work) {
        char options[2048], merged[600];
        snprintf(options, sizeof options, "lowerdir=%s,upperdir=%s/upper,workdir=%s/work", rootfs, work, work);
        snprintf(merged, sizeof merged, "%s/merged", work);
        OR_DIE(mount("overlay", merged, "overlay", 0, options));
        OR_DIE(chdir(merged));
    } else {
        OR_DIE(mount(rootfs, rootfs, NULL, MS_BIND | MS_REC, NULL));
        OR_DIE(chdir(rootfs));
    }
    OR_DIE(mount("proc", "proc", "proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL));
    OR_DIE(mount("tmpfs", "dev", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=64k"));
    OR_DIE(mkdir("dev/pts", 0755));
    OR_DIE(mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"));
    OR_DIE(mkdir("dev/shm", 0755));
    OR_DIE(mount("tmpfs", "dev/shm", "tmpfs", MS_NOSUID | MS_NOEXEC | MS_NODEV, "mode=1777,size=65536k"));
    OR_DIE(mkdir("dev/mqueue", 0755));
    OR_DIE(mount("mqueue", "dev/mqueue", "mqueue", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL));
    OR_DIE(mount("sysfs", "sys", "sysfs", MS_NOSUID | MS_NOEXEC | MS_NODEV | MS_RDONLY, NULL));
    OR_DIE(mount("tmpfs", "sys/fs/cgroup", "tmpfs", MS_NOSUID | MS_NOEXEC | MS_NODEV, "mode=755,size=64k"));
    for (int i = 0; i < groups; i++) {
        char target[64];
        snprintf(target, sizeof target, "sys/fs/cgroup/%s", V1[i]);
        OR_DIE(mkdir(target, 0755));
        OR_DIE(mount(paths[i], target, NULL, MS_BIND, NULL));
        OR_DIE(mount(NULL, target, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL));
    }
    OR_DIE(mount(NULL, "sys/fs/cgroup", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL));
    static const struct { const char *name; int major, minor; } nodes[] = {
        {"dev/null", 1, 3}, {"dev/zero", 1, 5}, {"dev/full", 1, 7}, {"dev/random", 1, 8}, {"dev/urandom", 1, 9}, {"dev/tty", 5, 0}};
    umask(0);
    for (unsigned i = 0; i < sizeof nodes / sizeof *nodes; i++)
        OR_DIE(mknod(nodes[i].name, S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)));
    OR_DIE(symlink("/proc/self/fd", "dev/fd"));
    OR_DIE(symlink("/proc/self/fd/0", "dev/stdin"));
    OR_DIE(symlink("/proc/self/fd/1", "dev/stdout"));
    OR_DIE(symlink("/proc/self/fd/2", "dev/stderr"));
    OR_DIE(symlink("pts/ptmx", "dev/ptmx"));
    OR_DIE(syscall(SYS_pivot_root, ".", "."));
    OR_DIE(umount2(".", MNT_DETACH));
    OR_DIE(chdir("/"));
    static const char *masked[] = {"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
        "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"};
    for (unsigned i = 0; i < sizeof masked / sizeof *masked; i++) {
        if (mount("/dev/null", masked[i], NULL, MS_BIND, NULL) == -1 && errno == ENOTDIR)
            OR_DIE(mount("tmpfs", masked[i], "tmpfs", MS_RDONLY, "size=0"));
    }
    static const char *read_only[] = {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"};
    for (unsigned i = 0; i < sizeof read_only / sizeof *read_only; i++) {
        if (mount(read_only[i], read_only[i], NULL, MS_BIND | MS_REC, NULL) == 0)
            OR_DIE(mount(NULL, read_only[i], NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL));
    }
    give_up_power();
    OR_DIE(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    if (program.len > 0) OR_DIE(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
    char *argv[] = {"true", NULL}, *env[] = {"PATH=/bin", NULL};
    execve("/bin/true", argv, env);
    _exit(127);
}

int main(int argc, char **argv) {
    if (argc != 6 && argc != 7) return 2;
    double begin = now_ms();
    int said[2];
    OR_DIE(pipe2(said, O_CLOEXEC));
    int fd = open(argv[5], O_RDONLY | O_CLOEXEC);
    OR_DIE(fd);
    ssize_t bytes = read(fd, filter, sizeof filter);
    OR_DIE(bytes);
    program.len = bytes / 8;
    struct clone_args args = {.exit_signal = SIGCHLD};
    args.flags = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | (argv[4][0] == '1' ? CLONE_NEWNET : 0);
    int netns = -1;
    if (argv[4][0] == '/') OR_DIE(netns = open(argv[4], O_RDONLY | O_CLOEXEC));
    int v2 = access("/sys/fs/cgroup/cgroup.procs", F_OK) == 0;
    if (v2) {
        snprintf(paths[0], sizeof paths[0], "/sys/fs/cgroup%s/%s", argv[3], argv[2]);
        OR_DIE(mkdir(paths[0], 0755));
        put(paths[0], "memory.max", "67108864");
        put(paths[0], "pids.max", "64");
        put(paths[0], "cpu.max", "50000 100000");
        args.flags |= CLONE_INTO_CGROUP;
        int directory = open(paths[0], O_PATH | O_DIRECTORY | O_CLOEXEC);
        OR_DIE(directory);
        args.cgroup = (unsigned)directory;
    } else {
        groups = 5;
        for (int i = 0; i < groups; i++) {
            snprintf(paths[i], sizeof paths[i], "/sys/fs/cgroup/%s%s/%s", V1[i], argv[3], argv[2]);
            OR_DIE(mkdir(paths[i], 0755));
        }
        put(paths[3], "memory.limit_in_bytes", "67108864");
        put(paths[4], "pids.max", "64");
        put(paths[0], "cpu.cfs_period_us", "100000");
        put(paths[0], "cpu.cfs_quota_us", "50000");
        for (int i = 0; i < groups; i++) {
            char path[600];
            snprintf(path, sizeof path, "%s/cgroup.procs", paths[i]);
            procs[i] = open(path, O_WRONLY | O_CLOEXEC);
            OR_DIE(procs[i]);
        }
    }
    long pid = syscall(SYS_clone3, &args, sizeof args);
    OR_DIE(pid);
    if (pid == 0) child(argv[1], argc == 7 ? argv[6] : NULL, netns);
    if (argc == 7) {
        char none;
        close(said[1]);
        /* The other end closes by exec. */
        OR_DIE(read(said[0], &none, 1));
        printf("%f\n", now_ms() - begin);
    }
    int status;
    OR_DIE(waitpid(pid, &status, 0));
    for (int i = 0; i < (v2 ? 1 : groups); i++) OR_DIE(rmdir(paths[i]));
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
