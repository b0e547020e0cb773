"""The other side of `evals.sandbox`: locks itself in, then runs a program in one process and its tests in another. Needs Linux.

python -I -c '…; sandbox_child.main()' FOLDER '{"folder": …, "uid": …, "seconds": …, "memory": …, "code": fd, "result": fd, …}'

Every lock is tried; what cannot be had is reported by name. Of the package only `sandbox_values` is imported: the rest is not
there inside.
"""

import builtins
import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import struct
import sys

from sandbox_values import OPERATIONS, Gone, Peer

FILE_BYTES = 16 * 2**20  # a file may have, and four times that all files together
FILES = 4096  # may exist at a time
RESULT = 4000  # bytes of the outcome, at most
MACHINE = os.uname().machine
LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
# Numbers of system calls that differ, and the architecture as seccomp spells it.
NUMBERS = {
    'x86_64': (0xC000003E, {'pivot_root': 155, 'ptrace': 101, 'kill': 62, 'tkill': 200, 'tgkill': 234, 'socket': 41,
                            'connect': 42, 'bind': 49, 'mount': 165, 'umount2': 166, 'chroot': 161, 'clone': 56,
                            'unshare': 272, 'setns': 308, 'keyctl': 250, 'add_key': 248, 'request_key': 249,
                            'process_vm_readv': 310, 'process_vm_writev': 311, 'rt_sigqueueinfo': 129,
                            'rt_tgsigqueueinfo': 297, 'perf_event_open': 298, 'bpf': 321, 'userfaultfd': 323,
                            'shmget': 29, 'shmat': 30, 'semget': 64, 'msgget': 68, 'memfd_create': 319, 'mq_open': 240,
                            'open_by_handle_at': 304, 'kcmp': 312}),
    'aarch64': (0xC00000B7, {'pivot_root': 41, 'ptrace': 117, 'kill': 129, 'tkill': 130, 'tgkill': 131, 'socket': 198,
                             'connect': 203, 'bind': 200, 'mount': 40, 'umount2': 39, 'chroot': 51, 'clone': 220,
                             'unshare': 97, 'setns': 268, 'keyctl': 219, 'add_key': 217, 'request_key': 218,
                             'process_vm_readv': 270, 'process_vm_writev': 271, 'rt_sigqueueinfo': 138,
                             'rt_tgsigqueueinfo': 240, 'perf_event_open': 241, 'bpf': 280, 'userfaultfd': 282,
                             'shmget': 194, 'shmat': 196, 'semget': 190, 'msgget': 186, 'memfd_create': 279, 'mq_open': 180,
                             'open_by_handle_at': 265, 'kcmp': 272}),
}  # fmt: skip
COMMON = {'pidfd_send_signal': 424, 'io_uring_setup': 425, 'io_uring_enter': 426, 'io_uring_register': 427, 'open_tree': 428,
          'move_mount': 429, 'fsopen': 430, 'fsconfig': 431, 'fsmount': 432, 'fspick': 433, 'pidfd_getfd': 438,
          'process_madvise': 440, 'mount_setattr': 442, 'memfd_secret': 447}  # fmt: skip
CLONE3, MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 435, 442, 444, 445, 446
CLONE_NEW = 0x7E020080  # every namespace


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


def enter_namespaces(other: int, folder: str) -> None:
    """No network, no other processes, no mounts of others; without the right to do so inside a user namespace."""
    kinds = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    if LIBC.unshare(kinds) == 0:
        return
    if os.getuid() == 0 and readable_by_all(folder):
        become(other)  # while it can be done: inside the user namespace there is no other user
        LIBC.prctl(4, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))  # to write the maps below
    uid, gid = os.getuid(), os.getgid()
    checked(LIBC.unshare(kinds | CLONE_NEWUSER))
    for name, text in (('setgroups', 'deny'), ('uid_map', f'{uid} {uid} 1'), ('gid_map', f'{gid} {gid} 1')):
        with open(f'/proc/self/{name}', 'w') as file:
            file.write(text)


def enter_root(folder: str, readable: list[str]) -> None:
    """A root directory of nothing but the interpreter and the system's libraries, read-only, and a small /tmp."""
    mount(None, '/', None, MS_REC | MS_PRIVATE)
    mount('none', folder, 'tmpfs', MS_NOSUID | MS_NODEV, 'mode=755,size=1m')
    os.mkdir(f'{folder}/tmp')  # first: the interpreter may lie in there
    mount_temporary(f'{folder}/tmp')
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
    os.symlink('/tmp', f'{folder}/dev/shm')  # semaphores of multiprocessing
    attributes = struct.pack('QQQQ', MS_RDONLY, 0, 0, 0)
    call(MOUNT_SETATTR, -100, folder.encode(), 0, attributes, len(attributes))
    os.chdir(folder)
    call(NUMBERS[MACHINE][1]['pivot_root'], b'.', b'.')
    checked(LIBC.umount2(b'.', 2))
    os.chdir('/tmp')


def mount_temporary(path: str) -> None:
    """A file system in memory, of limited size."""
    mount('none', path, 'tmpfs', MS_NOSUID | MS_NODEV, f'mode=1777,size={4 * FILE_BYTES},nr_inodes={FILES}')
    os.chdir(path)


def mount(source, target, kind, flags, data=None) -> None:
    """mount(2)."""
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    checked(LIBC.mount(*texts, ctypes.c_ulong(flags), None if data is None else data.encode()))


def readable_by_all(folder: str) -> bool:
    """Whether another user can reach the interpreter and the folder."""
    for path in (os.path.dirname(os.__file__), sys.executable, folder):
        while path != '/':
            path = os.path.dirname(path)
            if not os.stat(path).st_mode & 1:
                return False
    return True


def become(uid: int) -> None:
    """Another user, to whom nothing belongs."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def drop_privileges(uid: int, inside: str) -> None:
    """Another user, to whom nothing belongs, where this is root; and no capabilities.

    Raises:
      ValueError: the process stays the user that it is, so only the capabilities are gone.
      OSError: likewise.
    """
    problem = None
    if os.getuid() == 0:
        try:
            if inside != '/tmp' and not readable_by_all(inside):
                raise ValueError(f'only this user can read the interpreter in {sys.base_prefix}')
            become(uid)
        except (OSError, ValueError) as error:
            problem = error
    header, nothing = struct.pack('Ii', 0x20080522, 0), bytes(24)
    checked(LIBC.capset(header, nothing))
    no_new_privileges()
    if problem:
        raise problem


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
        resource.RLIMIT_MSGQUEUE: 0,
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


def seccomp(alone: bool) -> None:
    """Sockets, tracing, mounts, namespaces, memory that no limit counts and the like fail with EPERM.

    Args:
      alone: No other process can be seen, so that signals are harmless; multiprocessing sends them.
    """
    architecture, numbers = NUMBERS[MACHINE]
    clone = numbers['clone']
    free = {'clone', 'kill', 'tkill', 'tgkill'} if alone else {'clone'}
    denied = sorted(number for name, number in {**numbers, **COMMON}.items() if name not in free)
    load, equal, at_least, some, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(equal, 0, 1, CLONE3), (give, 0, 0, absent)]  # its flags lie in memory; the C library then takes clone
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (some, len(denied) + 3, 0, CLONE_NEW), (give, 0, 0, allow)]
    program.append((at_least, len(denied) + 1, 0, 0x40000000))  # x86_64's second set of numbers
    program += [(equal, len(denied) - index, 0, number) for index, number in enumerate(denied)]
    program += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    code = b''.join(struct.pack('HBBI', *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    wanted = struct.pack('HxxxxxxP', len(program), ctypes.addressof(buffer))
    checked(LIBC.prctl(22, ctypes.c_ulong(2), ctypes.c_char_p(wanted), ctypes.c_ulong(0), ctypes.c_ulong(0)))


class Names(dict):
    """Global names of the tests: theirs, the program's functions, and modules that tests expect the program to import.

    Of the program's names only those that it was asked for are used: its own `math` or `abs` could say anything.
    """

    def __init__(self, peer: Peer, asked: list[str]):
        super().__init__(__name__='tests')
        self.peer, self.asked = peer, asked

    def __missing__(self, name: str):
        if name in self.asked:
            self[name] = self.peer.ask('global', name)
        elif name in sys.stdlib_module_names and not hasattr(builtins, name):
            self[name] = importlib.import_module(name)
        else:
            raise KeyError(name)
        return self[name]


def run_checker(settings: dict, peer: Peer, missing: dict) -> None:
    """Runs the tests, for which the program's functions are `Remote`s, and writes the outcome where only this process can."""
    tests = _read(settings['tests'])
    try:
        kind, locks = peer.receive()  # what the program's process says before it runs any of the program
        missing = {**missing, **locks}
        peer.ask('load')
        exec(compile(tests, 'tests.py', 'exec'), Names(peer, settings['names']))
        outcome = 'passed'
    except Gone as error:
        outcome = str(error)
    except BaseException as error:  # SystemExit too: a program that leaves early has not passed
        outcome = f'{type(error).__name__}: {_text(error)}'
    os.write(settings['result'], (json.dumps(missing) + '\n' + outcome).encode(errors='replace')[:RESULT])
    os._exit(0)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return ''


def _read(descriptor: int) -> str:
    with open(descriptor, 'rb') as file:
        return file.read().decode()


def run_code(settings: dict, peer: Peer, missing: dict) -> None:
    """Runs the program, then does what the tests ask of it."""
    code, own = _read(settings['code']), os.getpid()
    module = sys.modules['__main__'] = type(sys)('__main__')  # where pickle looks for the program's functions
    space = vars(module)

    def load():
        exec(compile(code, 'program.py', 'exec'), space)
        if os.getpid() != own:  # a child of the program
            os._exit(0)

    peer.operations = {**OPERATIONS, 'load': load, 'global': space.__getitem__}
    peer.send(['locks', missing])
    while True:
        message = peer.receive()
        peer.answer(message)
        if os.getpid() != own:
            os._exit(0)


def innermost(settings: dict, missing: dict, inside: str, uid: int, role) -> None:
    """One of the two processes: the last locks, then what it is there for."""
    off = settings['off']
    dies_with_parent()
    for name, lock in (
        ('limits', lambda: limit(settings['seconds'], settings['memory'], settings['processes'])),
        ('privileges', lambda: drop_privileges(uid, inside)),
        ('landlock', lambda: (no_new_privileges(), landlock(inside, settings['readable']))),
        ('seccomp', lambda: (no_new_privileges(), seccomp('namespaces' not in missing))),
    ):
        attempt(name, lock, missing, off)
    LIBC.prctl(4, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))  # no process may look into this one
    with contextlib.suppress(Gone):
        role()
    os._exit(0)


def dies_with_parent() -> None:
    """No process of the sandbox is left behind."""
    LIBC.prctl(1, ctypes.c_ulong(signal.SIGKILL), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


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
    """Process A enters the namespaces; B, the first process in them, starts the checker and the program and waits for both.

    B's end ends all. Whatever only the checker may have is closed before the program's process begins, and the program's code
    is read in that process alone.
    """
    settings = json.loads(sys.argv[-1])
    del sys.path[0]  # where this module and `sandbox_values` lay
    for descriptor in settings['groups']:
        os.write(descriptor, b'0')  # of this process and its children from here on
        os.close(descriptor)
    dies_with_parent()
    missing: dict[str, str] = {}
    inside, off = settings['folder'], settings['off']
    os.chdir(inside)
    if settings['bubblewrap']:  # which has made the namespaces and the root directory
        inside = '/tmp'
        attempt('inodes', lambda: mount_temporary('/tmp'), missing, off)
    elif attempt('namespaces', lambda: enter_namespaces(settings['uid'], inside), missing, off):
        if attempt('root', lambda: enter_root(inside, settings['readable']), missing, off):
            inside = '/tmp'
    else:
        missing['root'] = 'no namespaces'
    os.dup2(os.open('/dev/null', os.O_RDWR), 0)
    first = os.fork()
    if first == 0:
        dies_with_parent()
        LIBC.prctl(36, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))  # adopts orphans
        start_both(settings, missing, inside)
        os._exit(0)
    for name in ('result', 'tests', 'code'):
        os.close(settings[name])
    os.waitpid(first, 0)


def start_both(settings: dict, missing: dict, inside: str) -> None:
    """The checker first: its files are closed when the program's process is made."""
    to_program, to_checker = os.pipe(), os.pipe()
    checker = os.fork()
    if checker == 0:
        os.close(settings['code'])
        os.close(to_program[0])
        os.close(to_checker[1])
        peer = Peer(to_checker[0], to_program[1], {'call': OPERATIONS['call']})
        innermost(settings, missing, inside, settings['uid'] + 1, lambda: run_checker(settings, peer, missing))
    for descriptor in (settings['result'], settings['tests'], to_checker[0], to_program[1]):
        os.close(descriptor)
    if os.fork() == 0:
        peer = Peer(to_program[0], to_checker[1], {})
        innermost(settings, missing, inside, settings['uid'], lambda: run_code(settings, peer, missing))
    for descriptor in (settings['code'], to_program[0], to_checker[1]):
        os.close(descriptor)
    os.waitpid(checker, 0)
