"""What a file system must do, in the working folder; each line that begins with OUTCOME is a name and what came of it.

Run by tests/suites.rs on the host and in a guest, which must agree. One process, since starting programs is what is slow under
emulation.
"""

import ctypes, errno, fcntl, mmap, os, signal, socket, stat, struct, time

libc = ctypes.CDLL(None, use_errno=True)
USER, GROUP = 1000, 1000


def outcome(name, what):
    print("OUTCOME", name, what, flush=True)


def check(name, act):
    """What `act` gives, or the error that it gets."""
    try:
        result = act()
        outcome(name, "ok" if result is None else result)
    except OSError as error:
        outcome(name, errno.errorcode.get(error.errno, error.errno))
    except Exception as error:  # a value that is not as it should be
        outcome(name, repr(error).replace("\n", " "))


def call(name, *words):
    ctypes.set_errno(0)
    if getattr(libc, name)(*words) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def as_user(act, uid=USER, gid=GROUP):
    """Does `act` in a process of another user; its error number, 0 if there is none."""
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            act()
        except OSError as error:
            code = error.errno
        except BaseException:
            code = 255
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, os.strerror(code) if code < 200 else "?")


def write(name, data="", flags=os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode=0o666):
    fd = os.open(name, flags, mode)
    os.write(fd, data.encode())
    os.close(fd)


def read(name):
    with open(name, "rb") as file:
        return file.read().decode()


def mode(name):
    return oct(os.lstat(name).st_mode)


def masked(mask, act):
    os.umask(mask)
    act()
    os.umask(0o022)


def program(bits=0o6777):
    write("program", "#!/bin/true\n")
    os.chown("program", 0, 0)
    os.chmod("program", bits)


os.umask(0o022)

# Modes and owners.
for mask in (0, 0o022, 0o077, 0o777):
    name = f"mask{mask:o}"
    masked(mask, lambda: (write(name), os.mkdir(name + "d"), os.mkfifo(name + "p")))
    check(name, lambda: (mode(name), mode(name + "d"), mode(name + "p")))
os.mkdir("setgid")
os.chown("setgid", 0, 77)
os.chmod("setgid", 0o2775)
write("setgid/f")
os.mkdir("setgid/d")
check("setgid-folder", lambda: [(mode(n), os.stat(n).st_gid) for n in ("setgid", "setgid/f", "setgid/d")])
for what, act in {
    "append": lambda: write("program", "x", os.O_WRONLY | os.O_APPEND),
    "overwrite": lambda: write("program", "x", os.O_WRONLY),
    "cut-at-open": lambda: write("program", "", os.O_WRONLY | os.O_TRUNC),
    "truncate": lambda: os.truncate("program", 3),
    "allocate": lambda: os.posix_fallocate(os.open("program", os.O_WRONLY), 0, 100000),
}.items():
    for bits in (0o6777, 0o2767):
        program(bits)
        check(f"suid-{what}-{bits:o}", lambda: as_user(act))
        check(f"suid-after-{what}-{bits:o}", lambda: mode("program"))
        program(bits)
        check(f"root-{what}-{bits:o}", act)
        check(f"suid-after-roots-{what}-{bits:o}", lambda: mode("program"))
program()
check("suid-after-chown", lambda: (os.chown("program", USER, GROUP), mode("program"))[1])
check("suid-after-own-chown", lambda: (os.chmod("program", 0o6755), as_user(lambda: os.chown("program", -1, GROUP)), mode("program"))[2])
os.mkdir("sticky")
os.chmod("sticky", 0o1777)
write("sticky/roots")
check("sticky", lambda: as_user(lambda: os.unlink("sticky/roots")))
os.mkdir("closed", 0o700)
write("closed/f")
check("closed", lambda: as_user(lambda: os.stat("closed/f")))
check("foreign-chmod", lambda: as_user(lambda: os.chmod("mask0", 0o600)))
check("foreign-chown", lambda: as_user(lambda: os.chown("mask0", USER, -1)))
check("give-away", lambda: (write("own"), os.chown("own", USER, GROUP), as_user(lambda: os.chown("own", 0, -1)))[2])
os.mkdir("open")
os.chmod("open", 0o777)
check("new-file", lambda: as_user(lambda: write("open/f")))
check("its-owner", lambda: (os.stat("open/f").st_uid, os.stat("open/f").st_gid))

# Names.
write("f", "content\n")
write("g", "g")
check("link", lambda: (os.link("f", "hard"), os.stat("f").st_nlink)[1])
check("link-to-a-folder", lambda: os.link("open", "open2"))
check("symlink", lambda: (os.symlink("nowhere", "dangling"), os.readlink("dangling"))[1])
check("dangling", lambda: read("dangling"))
check("loop", lambda: (os.symlink("loop", "loop"), read("loop")))
check("link-to-a-link", lambda: (os.link("dangling", "dangling2", follow_symlinks=False), mode("dangling2"))[1])
check("rename", lambda: (os.rename("g", "k"), os.path.exists("g"), read("k"))[1:])
check("rename-over", lambda: (write("l", "l"), os.rename("l", "k"), read("k"))[2])
os.mkdir("full")
write("full/x")
os.mkdir("empty")
check("rmdir-full", lambda: os.rmdir("full"))
check("rename-over-full", lambda: os.rename("empty", "full"))
check("rename-over-empty", lambda: os.rename("full", "empty"))
check("rename-into-itself", lambda: os.rename("empty", "empty/x2"))
check("unlink-folder", lambda: os.unlink("empty"))
check("rmdir-file", lambda: os.rmdir("f"))
check("rename-folder-over-file", lambda: os.rename("empty", "k"))
check("exchange", lambda: (call("renameat2", -100, b"f", -100, b"k", 2), read("f"), read("k"))[1:])
check("exchange-back", lambda: call("renameat2", -100, b"f", -100, b"k", 2))
check("noreplace", lambda: call("renameat2", -100, b"f", -100, b"k", 1))
check("noreplace-free", lambda: call("renameat2", -100, b"k", -100, b"free", 1))
check("whiteout", lambda: (call("renameat2", -100, b"free", -100, b"k", 4), stat.S_ISCHR(os.lstat("free").st_mode), os.lstat("free").st_rdev)[1:])
check("odd-rename-flags", lambda: call("renameat2", -100, b"f", -100, b"k", 1 << 10))
os.mkdir("full")
write("full/x")
check("longest-name", lambda: write("n" * 255))
check("too-long-name", lambda: write("n" * 256))
check("longest-target", lambda: (os.symlink("t" * 4095, "longlink"), len(os.readlink("longlink")))[1])
check("exclusive", lambda: write("f", "", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
check("exclusive-on-a-link", lambda: write("dangling", "", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
check("create-through-a-link", lambda: (write("dangling", "x"), read("nowhere"))[1])
check("nofollow", lambda: os.open("dangling", os.O_RDONLY | os.O_NOFOLLOW))
check("directory", lambda: os.open("f", os.O_RDONLY | os.O_DIRECTORY))
check("write-a-folder", lambda: os.open("full", os.O_WRONLY))
for kind, make in (("fifo", lambda n: os.mkfifo(n)), ("node", lambda n: os.mknod(n, 0o100600)), ("socket", lambda n: socket.socket(socket.AF_UNIX).bind(n))):
    check(kind, lambda: (make(kind), mode(kind))[1])


def through_a_fifo():
    pid = os.fork()
    if pid == 0:
        write("fifo", "through", os.O_WRONLY)
        os._exit(0)
    text = read("fifo")
    os.waitpid(pid, 0)
    return text


check("through-a-fifo", through_a_fifo)

# Contents.
fd = os.open("holes", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 10 << 20)
os.pwrite(fd, b"x", 5 << 20)


def holes():
    data = os.lseek(fd, 0, os.SEEK_DATA)
    hole = os.lseek(fd, data, os.SEEK_HOLE)
    return os.lseek(fd, 0, os.SEEK_END), 0 < data <= 5 << 20 < hole <= 10 << 20


check("holes", holes)
check("seek-behind-the-end", lambda: os.lseek(fd, 11 << 20, os.SEEK_DATA))
check("hole-at-the-end", lambda: os.lseek(fd, (10 << 20) - 1, os.SEEK_HOLE))
space = os.open("space", os.O_RDWR | os.O_CREAT)
off = ctypes.c_int64
for name, flags, at, length in (
    ("allocate", 0, 0, 1 << 20), ("keep-size", 1, 0, 2 << 20), ("punch", 3, 4096, 8192), ("punch-alone", 2, 0, 4096),
    ("zero", 16, 0, 4096), ("collapse", 8, 0, 4096), ("insert", 32, 4096, 4096), ("nothing", 0, 0, 0), ("odd", 1 << 12, 0, 1),
):
    check(f"fallocate-{name}", lambda: (call("fallocate", space, flags, off(at), off(length)), os.fstat(space).st_size)[1])
copy = os.open("copy", os.O_RDWR | os.O_CREAT)
check("copy-range", lambda: (os.copy_file_range(fd, copy, 8192, 5 << 20, 100), os.pread(copy, 1, 100), os.fstat(copy).st_size))
check("copy-range-overlap", lambda: os.copy_file_range(copy, copy, 4096, 0, 100))
check("copy-range-behind", lambda: os.copy_file_range(fd, copy, 4096, 20 << 20, 0))


def append():
    write("app", "first ")
    a, b = (os.open("app", os.O_WRONLY | os.O_APPEND) for _ in range(2))
    os.write(a, b"a")
    os.write(b, b"b")
    os.write(a, b"c")
    os.pwrite(a, b"d", 0)
    os.close(a)
    os.close(b)
    return read("app")


check("append", append)
check("sparse-append", lambda: (os.truncate("app", 100), write("app", "e", os.O_WRONLY | os.O_APPEND), os.stat("app").st_size)[2])


def gone():
    write("gone", "data")
    file = os.open("gone", os.O_RDWR)
    os.unlink("gone")
    os.write(file, b"DA")
    size = os.fstat(file).st_size
    links = os.fstat(file).st_nlink
    os.ftruncate(file, 3)
    return os.pread(file, 10, 0), size, links


check("open-and-gone", gone)


def tmpfile(flags, name):
    file = os.open(".", os.O_RDWR | os.O_TMPFILE | flags, 0o640)
    os.write(file, b"x")
    root = os.open("/", os.O_RDONLY)
    os.link(f"/proc/self/fd/{file}", name, src_dir_fd=root, follow_symlinks=True)
    return read(name), mode(name)


check("tmpfile", lambda: tmpfile(0, "from-tmpfile"))
check("tmpfile-exclusive", lambda: tmpfile(os.O_EXCL, "never"))


def mapped():
    file = os.open("mapped", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 8192)
    memory = mmap.mmap(file, 8192)
    memory[4096:4100] = b"abcd"
    memory.flush()
    os.pwrite(file, b"wxyz", 0)
    return os.pread(file, 4, 4096), memory[:4]


check("mmap", mapped)
check("read-only-write", lambda: os.write(os.open("f", os.O_RDONLY), b"x"))
check("negative-offset", lambda: os.pread(fd, 1, -1))
check("huge-truncate", lambda: os.truncate("f", 1 << 62))
check("fsync", lambda: (os.fsync(fd), os.fdatasync(fd), os.sync())[0])
check("sync-a-folder", lambda: os.fsync(os.open(".", os.O_RDONLY)))

# Times.
write("old")
check("nanoseconds", lambda: (os.utime("old", ns=(946684799123456789, 946684799987654321)), os.stat("old").st_mtime_ns, os.stat("old").st_atime_ns)[1:])
check("before-1970", lambda: (os.utime("old", ns=(-1500000000, -1500000000)), os.stat("old").st_mtime_ns)[1])
check("time-of-a-link", lambda: (os.utime("dangling", (978307200, 978307200), follow_symlinks=False), os.lstat("dangling").st_mtime)[1])


def newer(act, name="old"):
    os.utime(name, (946684800, 946684800))
    before = os.stat(name)
    time.sleep(0.02)
    act()
    after = os.stat(name)
    return after.st_mtime > before.st_mtime, after.st_ctime_ns > before.st_ctime_ns


check("times-after-write", lambda: newer(lambda: write("old", "x", os.O_WRONLY)))
check("times-after-truncate", lambda: newer(lambda: os.truncate("old", 10)))
check("times-after-same-truncate", lambda: newer(lambda: os.truncate("old", 10)))
check("times-after-chmod", lambda: newer(lambda: os.chmod("old", 0o600)))
check("times-after-link", lambda: newer(lambda: os.link("old", "older")))
check("times-after-unlink", lambda: newer(lambda: os.unlink("older")))
check("folder-after-create", lambda: newer(lambda: write("full/y"), "full"))
check("folder-after-remove", lambda: newer(lambda: os.unlink("full/y"), "full"))
check("folder-after-read", lambda: newer(lambda: os.listdir("full"), "full"))
check("foreign-utime", lambda: as_user(lambda: os.utime("old", (1, 1))))
check("foreign-touch", lambda: (os.chmod("old", 0o666), as_user(lambda: os.utime("old")))[1])

# Folders.
os.mkdir("many")
for n in range(1500):
    write(f"many/n{n}")
check("entries", lambda: len(os.listdir("many")))


def remove_while_reading():
    removed = 0
    for entry in os.scandir("many"):
        os.unlink(entry.path)
        removed += 1
    return removed, os.listdir("many")


check("remove-while-reading", remove_while_reading)
check("links-of-a-folder", lambda: (os.mkdir("many/a"), os.mkdir("many/b"), os.stat("many").st_nlink)[2])
check("types", lambda: sorted((e.name, e.is_dir(), e.is_symlink()) for e in os.scandir(".") if e.name in ("f", "full", "dangling", "fifo")))

# Extended attributes.
check("set", lambda: (os.setxattr("f", "user.a", b"value"), os.getxattr("f", "user.a"))[1])
check("list", lambda: (os.setxattr("f", "user.b", b""), sorted(os.listxattr("f")))[1])
check("create", lambda: os.setxattr("f", "user.a", b"x", os.XATTR_CREATE))
check("replace", lambda: os.setxattr("f", "user.none", b"x", os.XATTR_REPLACE))
check("remove", lambda: (os.removexattr("f", "user.a"), os.listxattr("f"))[1])
check("remove-again", lambda: os.removexattr("f", "user.a"))
check("large", lambda: (os.setxattr("f", "user.c", b"x" * 2000), len(os.getxattr("f", "user.c")))[1])
check("longest-attribute", lambda: (os.setxattr("f", "user." + "n" * 250, b""), len(os.listxattr("f")))[1])
check("too-long-attribute", lambda: os.setxattr("f", "user." + "n" * 251, b""))
check("on-a-link", lambda: os.setxattr("dangling", "user.a", b"x", follow_symlinks=False))
check("on-a-fifo", lambda: os.setxattr("fifo", "user.a", b"x"))
check("foreign-attribute", lambda: as_user(lambda: os.setxattr("f", "user.x", b"x")))
check("odd-attribute", lambda: os.setxattr("f", "odd.a", b"x"))

# Lists.
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def acl(*entries):
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries)


def shown(name, which):
    data = os.getxattr(name, which)[4:]
    return [struct.unpack_from("<HHi", data, at) for at in range(0, len(data), 8)]


NONE = 0xFFFFFFFF
LIST = acl((1, 6, NONE), (2, 6, USER), (4, 4, NONE), (8, 4, 77), (16, 6, NONE), (32, 0, NONE))
write("listed")
check("acl", lambda: (os.setxattr("listed", ACCESS, LIST), mode("listed"), shown("listed", ACCESS))[1:])
check("acl-lets", lambda: as_user(lambda: write("listed", "x", os.O_WRONLY)))
check("acl-lets-not", lambda: as_user(lambda: write("listed", "x", os.O_WRONLY), USER + 1))
check("acl-lets-group-read", lambda: as_user(lambda: read("listed"), USER + 1, 77))
check("acl-mask-by-chmod", lambda: (os.chmod("listed", 0o640), shown("listed", ACCESS))[1])
check("acl-masked", lambda: as_user(lambda: write("listed", "x", os.O_WRONLY)))
check("acl-wrong", lambda: os.setxattr("listed", ACCESS, acl((1, 6, NONE))))
check("acl-removed", lambda: (os.removexattr("listed", ACCESS), mode("listed"))[1])
os.mkdir("default")
check("default-acl", lambda: os.setxattr("default", DEFAULT, acl((1, 7, NONE), (2, 7, USER), (4, 5, NONE), (16, 7, NONE), (32, 0, NONE))))
masked(0o077, lambda: (write("default/f"), os.mkdir("default/d"), os.mkfifo("default/p")))
check("inherited", lambda: [(mode(f"default/{n}"), shown(f"default/{n}", ACCESS)) for n in "fdp"])
check("inherited-default", lambda: shown("default/d", DEFAULT))
check("default-on-a-file", lambda: os.setxattr("f", DEFAULT, LIST))
os.chown("setgid", USER, 77)
os.chmod("setgid", 0o2775)
check("acl-kills-setgid", lambda: (as_user(lambda: os.setxattr("setgid", ACCESS, acl((1, 7, NONE), (2, 5, 3), (4, 7, NONE), (16, 7, NONE), (32, 5, NONE)))), mode("setgid"))[1])

# Locks.
write("locked", "x" * 100)


def flocks():
    a, b = os.open("locked", os.O_RDWR), os.open("locked", os.O_RDWR)
    fcntl.flock(a, fcntl.LOCK_EX)
    try:
        fcntl.flock(b, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return "both"
    except BlockingIOError:
        pass
    fcntl.flock(a, fcntl.LOCK_UN)
    fcntl.flock(b, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(b)
    fcntl.flock(a, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(a)


check("flock", flocks)


def beside(child, act):
    """`child` in a process of its own; `act` here, told its id."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(child() or 0)
        except OSError as error:
            os._exit(error.errno)
    act()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def range_locks():
    file = open("locked", "r+")
    fcntl.lockf(file, fcntl.LOCK_EX, 10, 0)

    def child():
        other = open("locked", "r+")
        try:
            fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 5)
            return 200
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return error.errno
        held = fcntl.fcntl(other, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 3, 1, 0))
        kind, _, start, length, _ = struct.unpack("hhqqi4x", held)
        if (kind, start, length) != (fcntl.F_WRLCK, 0, 10):
            return 201
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 10)
        fcntl.lockf(other, fcntl.LOCK_EX, 1, 0)  # waits
        return 0

    return beside(child, lambda: (time.sleep(0.3), fcntl.lockf(file, fcntl.LOCK_UN, 10, 0)))


check("range-locks", range_locks)


def interrupted():
    file = os.open("locked", os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)

    def child():
        signal.signal(signal.SIGALRM, lambda *_: os._exit(77))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        fcntl.flock(os.open("locked", os.O_RDWR), fcntl.LOCK_EX)
        return 1

    code = beside(child, lambda: None)
    os.close(file)
    return code


check("interrupted", interrupted)


def deadlock():
    file = open("locked", "r+")
    fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)

    def child():
        other = open("locked", "r+")
        fcntl.lockf(other, fcntl.LOCK_EX, 1, 1)
        time.sleep(0.2)
        fcntl.lockf(other, fcntl.LOCK_EX, 1, 0)  # waits for the parent
        return 0

    def parent():
        time.sleep(0.6)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 1)
            outcome("deadlock-seen", "no")
        except OSError as error:
            outcome("deadlock-seen", errno.errorcode[error.errno])
        fcntl.lockf(file, fcntl.LOCK_UN)

    return beside(child, parent)


check("deadlock", deadlock)
check("end", lambda: None)
