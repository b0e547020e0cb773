"""The other side of `evals.sandbox`: locks itself in, then runs the program that comes on its standard input. Needs Linux.

python -I sandbox_child.py '{"folder": …, "uid": …, "seconds": …, "memory": …, "processes": …, "readable": […], "result": fd, …}'

Every lock is tried; what cannot be had is reported by name. Nothing of the package is imported: it is not there inside.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

FILE_BYTES = 16 * 2**20  # a file may have, and four times that all files together
MACHINE = platform.machine()
LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
# Numbers of system calls that differ, and the architecture as seccomp spells it.
NUMBERS = {
    'x86_64': (0xC000003E, {'pivot_root': 155, 'ptrace': 101, 'kill': 62, 'tkill': 200, 'tgkill': 234, 'socket': 41,
                            'socketpair': 53, 'connect': 42, 'bind': 49, 'mount': 165, 'umount2': 166, 'chroot': 161,
                            'unshare': 272, 'setns': 308, 'keyctl': 250, 'add_key': 248, 'request_key': 249,
                            'process_vm_readv': 310, 'process_vm_writev': 311, 'rt_sigqueueinfo': 129,
                            'rt_tgsigqueueinfo': 297, 'perf_event_open': 298, 'bpf': 321, 'userfaultfd': 323}),
    'aarch64': (0xC00000B7, {'pivot_root': 41, 'ptrace': 117, 'kill': 129, 'tkill': 130, 'tgkill': 131, 'socket': 198,
                             'socketpair': 199, 'connect': 203, 'bind': 200, 'mount': 40, 'umount2': 39, 'chroot': 51,
                             'unshare': 97, 'setns': 268, 'keyctl': 219, 'add_key': 217, 'request_key': 218,
                             'process_vm_readv': 270, 'process_vm_writev': 271, 'rt_sigqueueinfo': 138,
                             'rt_tgsigqueueinfo': 240, 'perf_event_open': 241, 'bpf': 280, 'userfaultfd': 282}),
}  # fmt: skip
COMMON = {'pidfd_send_signal': 424, 'io_uring_setup': 425, 'open_tree': 428, 'move_mount': 429, 'fsopen': 430}
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446


def call(number: int, *arguments) -> int:
    """A system call; raises OSError."""
    result = LIBC.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def checked(result: int) -> None:
    """Raises OSError for what a function of the C library returns where it fails."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def enter_namespaces() -> None:
    """No network, no other processes, no mounts of others; without root inside a user namespace."""
    kinds = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.getuid(), os.getgid()
    checked(LIBC.unshare(kinds if uid == 0 else kinds | CLONE_NEWUSER))
    if uid != 0:
        for name, text in (('setgroups', 'deny'), ('uid_map', f'{uid} {uid} 1'), ('gid_map', f'{gid} {gid} 1')):
            with open(f'/proc/self/{name}', 'w') as file:
                file.write(text)


def enter_root(folder: str, readable: list[str]) -> None:
    """A root directory of nothing but the interpreter and the system's libraries, read-only, and a small /tmp."""
    mount(None, '/', None, MS_REC | MS_PRIVATE)
    mount('none', folder, 'tmpfs', MS_NOSUID | MS_NODEV, 'mode=755,size=1m')
    os.mkdir(f'{folder}/tmp')  # first: the interpreter may lie in there
    mount('none', f'{folder}/tmp', 'tmpfs', MS_NOSUID | MS_NODEV, f'mode=1777,size={4 * FILE_BYTES}')
    for path in readable:
        inside = folder + path
        if os.path.islink(path):  # such as /lib -> usr/lib
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.symlink(os.readlink(path), inside)
        elif os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
            mount(path, inside, None, MS_BIND | MS_REC)
            attributes = struct.pack('QQQQ', MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
            call(MOUNT_SETATTR, -100, inside.encode(), 0x8000, attributes, len(attributes))
    for name in ('null', 'zero', 'urandom'):
        os.makedirs(f'{folder}/dev', exist_ok=True)
        os.close(os.open(f'{folder}/dev/{name}', os.O_CREAT | os.O_WRONLY, 0o644))
        mount(f'/dev/{name}', f'{folder}/dev/{name}', None, MS_BIND)
    attributes = struct.pack('QQQQ', MS_RDONLY, 0, 0, 0)
    call(MOUNT_SETATTR, -100, folder.encode(), 0, attributes, len(attributes))
    os.chdir(folder)
    call(NUMBERS[MACHINE][1]['pivot_root'], b'.', b'.')
    checked(LIBC.umount2(b'.', 2))
    os.chdir('/tmp')


def mount(source, target, kind, flags, data=None) -> None:
    """mount(2)."""
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    checked(LIBC.mount(*texts, ctypes.c_ulong(flags), None if data is None else data.encode()))


def drop_privileges(uid: int, inside: str) -> None:
    """Another user, whom nothing belongs to, where this is root; and no capabilities.

    Raises:
      ValueError: the other user could not read the interpreter, so only the capabilities are gone.
    """
    library, open_to_all = os.path.dirname(os.__file__), True
    while inside != '/tmp' and library != '/':
        open_to_all &= bool(os.stat(library).st_mode & 1)
        library = os.path.dirname(library)
    if os.getuid() == 0 and open_to_all:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header, nothing = struct.pack('Ii', 0x20080522, 0), bytes(24)
    checked(LIBC.capset(header, nothing))
    no_new_privileges()
    if os.getuid() == 0:
        raise ValueError(f'only this user can read the interpreter in {sys.base_prefix}')


def no_new_privileges() -> None:
    """Which landlock and seccomp want."""
    checked(LIBC.prctl(38, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)))


def limit(seconds: int, memory: int, processes: int) -> None:
    """Resource limits, of each process but for the number of them."""
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


def landlock(folder: str, readable: list[str]) -> None:
    """Files: reading below `readable` only, writing below `folder` only; from Linux 6.7 no TCP either."""
    version = call(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    rights = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    read = 1 | 4 | 8  # execute, read files, read directories
    attributes = struct.pack('QQ', rights, 3)[: 16 if version >= 4 else 8]
    ruleset = call(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    for path, allowed in [(folder, rights), *((path, read) for path in readable), ('/dev', 2 | 4 | 8)]:
        if os.path.isdir(path):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack('=Qi', allowed & rights, descriptor)
            call(LANDLOCK_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
            os.close(descriptor)
    call(LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint(0))
    os.close(ruleset)


def seccomp() -> None:
    """Sockets, signals to others, tracing, mounts and the like fail with EPERM."""
    architecture, numbers = NUMBERS[MACHINE]
    denied = sorted({**numbers, **COMMON}.values())
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program.append((at_least, len(denied) + 1, 0, 0x40000000))  # x86_64's second set of numbers
    program += [(equal, len(denied) - index, 0, number) for index, number in enumerate(denied)]
    program += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    code = b''.join(struct.pack('HBBI', *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    wanted = struct.pack('HxxxxxxP', len(program), ctypes.addressof(buffer))
    checked(LIBC.prctl(22, ctypes.c_ulong(2), ctypes.c_char_p(wanted), ctypes.c_ulong(0), ctypes.c_ulong(0)))


def audit(folder: str) -> None:
    """The second line: what a program has no business with raises inside Python already."""
    real = os.path.realpath
    forbidden = ('socket.', 'subprocess.', 'os.system', 'os.exec', 'os.posix_spawn', 'os.kill', 'os.putenv', 'ctypes.', 'ftplib.')
    forbidden += ('os.chmod', 'os.chown', 'os.link', 'os.symlink', 'pty.', 'sys.addaudithook', 'urllib.', 'winreg.')

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(forbidden):
            raise PermissionError(f'{event} is not allowed here')
        if event == 'open' and isinstance(arguments[0], str | bytes) and _writes(arguments):
            path = real(os.fsdecode(arguments[0]))
            if not path.startswith(folder.rstrip('/') + '/') and path != '/dev/null':
                raise PermissionError(f'{path} may not be written')

    sys.addaudithook(hook)


def _writes(arguments: tuple) -> bool:
    _, mode, flags = arguments
    return bool(set(mode or '') & set('wax+')) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def run(settings: dict, code: str, missing: dict, inside: str) -> None:
    """The innermost process: the last locks, then the program. Its token is written only if it comes to its end."""
    token, own = settings.pop('token'), os.getpid()
    readable, off = settings['readable'], settings['off']
    for name, lock in (
        ('limits', lambda: limit(settings['seconds'], settings['memory'], settings['processes'])),
        ('privileges', lambda: drop_privileges(settings['uid'], inside)),
        ('landlock', lambda: (no_new_privileges(), landlock(inside, readable))),
        ('seccomp', lambda: (no_new_privileges(), seccomp())),
    ):
        attempt(name, lock, missing, off)
    attempt('audit', lambda: audit(inside), missing, off)
    result = settings['result']
    os.write(result, (json.dumps(missing) + '\n').encode())
    try:
        exec(compile(code, 'program.py', 'exec'), {'__name__': '__main__'})
        outcome = f'passed {token}'
    except BaseException as error:  # SystemExit too: a program that leaves early has not passed
        outcome = f'{type(error).__name__}: {str(error)[:200]}'
    if os.getpid() == own:  # and not a child of the program
        os.write(result, outcome.encode(errors='replace'))
    os._exit(0)


def attempt(name: str, lock, missing: dict, off: list[str]) -> bool:
    """Puts a lock on, or notes why not."""
    try:
        if name in off:
            raise ValueError('switched off')
        lock()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        missing[name] = str(error)
        return False
    return True


def main() -> None:
    """Process A enters the namespaces; B, the first process in them, waits for C, which runs the program; B's end ends all."""
    settings = json.loads(sys.argv[1])
    code = sys.stdin.buffer.read().decode()
    LIBC.prctl(1, ctypes.c_ulong(signal.SIGKILL), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))  # dies with its parent
    missing: dict[str, str] = {}
    inside, off = settings['folder'], settings['off']
    os.chdir(inside)
    if attempt('namespaces', enter_namespaces, missing, off):
        if attempt('root', lambda: enter_root(inside, settings['readable']), missing, off):
            inside = '/tmp'
    else:
        missing['root'] = 'no namespaces'
    os.dup2(os.open('/dev/null', os.O_RDWR), 0)
    first = os.fork()
    if first == 0:
        LIBC.prctl(1, ctypes.c_ulong(signal.SIGKILL), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
        inner = os.fork()
        if inner == 0:
            run(settings, code, missing, inside)
        os.close(settings['result'])
        os.waitpid(inner, 0)
        os._exit(0)
    os.close(settings['result'])
    os.waitpid(first, 0)


if __name__ == '__main__':
    main()
