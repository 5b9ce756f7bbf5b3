package uffdtest

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

func nativeUint64(b [8]byte) uint64 { return binary.NativeEndian.Uint64(b[:]) }

// fdSocket is the descriptor that the faulting process sends others over.
const fdSocket = 3

// faulting is the state of the faulting process.
var faulting struct {
	sync.Mutex
	out  *json.Encoder
	file *uffd.File // the last opened
	gate [2]int     // pipe that forked processes wait on

	forks atomic.Uint64 // children made
}

// faulter is the life of the faulting process: it serves the requests of its
// parent until that is gone.
func faulter() error {
	faulting.out = json.NewEncoder(os.Stdout)
	if err := unix.Pipe2(faulting.gate[:], 0); err != nil {
		return err
	}
	in := json.NewDecoder(os.Stdin)
	for {
		var r request
		if err := in.Decode(&r); err != nil {
			return nil
		}
		go func() {
			values, err := serve(r)
			answer := reply{ID: r.ID, Values: values}
			var errno syscall.Errno
			switch {
			case err == ErrSigbus:
				answer.Sigbus = true
			case errors.As(err, &errno):
				answer.Errno = int(errno)
			case err != nil:
				answer.Failure = err.Error()
			}
			faulting.Lock()
			defer faulting.Unlock()
			faulting.out.Encode(answer)
		}()
	}
}

// at is the memory at an address that mmap returned.
func at(a uint64) unsafe.Pointer {
	p := uintptr(a)
	return *(*unsafe.Pointer)(unsafe.Pointer(&p))
}

// load and store do nothing but that: where the race detector looks on, a write
// begins with a read.

//go:norace
//go:noinline
func load(p unsafe.Pointer) byte { return *(*byte)(p) }

//go:norace
//go:noinline
func store(p unsafe.Pointer, b byte) { *(*byte)(p) = b }

func bytesAt(a, n uint64) []byte { return unsafe.Slice((*byte)(at(a)), n) }

func serve(r request) (values []uint64, err error) {
	debug.SetPanicOnFault(true)
	defer func() {
		if p := recover(); p != nil {
			if _, ok := p.(interface{ Addr() uintptr }); !ok {
				panic(p)
			}
			err = ErrSigbus
		}
	}()
	a := r.Args
	switch r.Op {
	case "map":
		return mapMemory(Kind(a[0]), uintptr(a[1]))
	case "mmap":
		p, err := unix.MmapPtr(int(int64(a[4])), 0, at(a[0]), uintptr(a[1]), int(a[2]), int(a[3]))
		return []uint64{uint64(uintptr(p))}, err
	case "open-read-only":
		fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", a[0]), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return []uint64{uint64(fd)}, err
	case "open":
		return nil, openAndSend(&uffd.Config{Faults: uffd.Faults(a[0]), Require: uffd.Features(a[1]), Prefer: uffd.Features(a[2])})
	case "close":
		return nil, lastFile().Close()
	case "load":
		return []uint64{uint64(load(at(a[0])))}, nil
	case "store":
		store(at(a[0]), byte(a[1]))
		return nil, nil
	case "touch":
		var sum uint64
		mem := bytesAt(a[0], a[1])
		for i := uint64(0); i < a[1]; i += a[2] {
			sum += uint64(mem[i])
		}
		return []uint64{sum}, nil
	case "fill":
		for i := range a[1] {
			store(unsafe.Add(at(a[0]), i), byte(a[2]))
		}
		return nil, nil
	case "check":
		return []uint64{differing(at(a[0]), a[1], byte(a[2]))}, nil
	case "populate":
		return nil, uffd.Populate(bytesAt(a[0], a[1]), a[2] != 0)
	case "move":
		n, err := lastFile().Move(uffd.Addr(a[0]), uffd.Range{Start: uffd.Addr(a[1]), Len: a[2]}, uffd.MoveMode(a[3]))
		return []uint64{uint64(n)}, err
	case "syscall":
		v, _, errno := unix.Syscall6(uintptr(a[0]), uintptr(a[1]), uintptr(a[2]), uintptr(a[3]), uintptr(a[4]), uintptr(a[5]), 0)
		if errno != 0 {
			return nil, errno
		}
		return []uint64{uint64(v)}, nil
	case "fork":
		return fork(r.Steps)
	case "forks":
		return []uint64{faulting.forks.Load()}, nil
	case "gate":
		_, err := unix.Write(faulting.gate[1], []byte{0})
		return nil, err
	}
	if do := handlers[r.Op]; do != nil {
		return do(a[:])
	}
	return nil, fmt.Errorf("unknown request %q", r.Op)
}

func lastFile() *uffd.File {
	faulting.Lock()
	defer faulting.Unlock()
	return faulting.file
}

func mapMemory(kind Kind, length uintptr) ([]uint64, error) {
	fd, flags := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS
	if kind != Anon {
		memfdFlags := unix.MFD_CLOEXEC
		if kind.Huge() {
			memfdFlags |= unix.MFD_HUGETLB
		}
		var err error
		if fd, err = unix.MemfdCreate("uffdtest", memfdFlags); err != nil {
			return nil, err
		}
		if err := unix.Ftruncate(fd, int64(length)); err != nil {
			return nil, err
		}
		flags = unix.MAP_PRIVATE
		if kind.Shared() {
			flags = unix.MAP_SHARED
		}
	}
	p, err := unix.MmapPtr(fd, 0, nil, length, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return nil, err
	}
	return []uint64{uint64(uintptr(p)), uint64(int64(fd))}, nil
}

// openAndSend opens a userfaultfd and sends a copy of it to the parent.
func openAndSend(c *uffd.Config) error {
	f, err := uffd.New(c)
	if err != nil {
		return err
	}
	faulting.Lock()
	faulting.file = f
	faulting.Unlock()
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	err = conn.Control(func(fd uintptr) {
		sendErr = unix.Sendmsg(fdSocket, []byte{0}, unix.UnixRights(int(fd)), nil, 0)
	})
	return cmp(err, sendErr)
}

// differing counts the bytes that are not b.
//
//go:nosplit
//go:norace
func differing(p unsafe.Pointer, n uint64, b byte) (count uint64) {
	for i := uint64(0); i < n; i++ {
		if *(*byte)(unsafe.Add(p, i)) != b {
			count++
		}
	}
	return count
}

const (
	maxSteps    = 32
	pagemapPath = "/proc/self/pagemap"
)

// A script is what a forked process does. It is all the memory that it uses.
type script struct {
	steps   [maxSteps]Step
	n       int
	results [maxSteps]uint64
	gate    uintptr // reading end
	pagemap [len(pagemapPath) + 1]byte
	page    uint64  // its size
	out     uintptr // writing end of a pipe for the results
}

// fork forks the process as fork(2) does, which the os package cannot. The child
// has one thread and a copy of a running Go program: it runs script and no
// more.
func fork(steps []Step) ([]uint64, error) {
	if len(steps) > maxSteps {
		return nil, fmt.Errorf("at most %d steps", maxSteps)
	}
	var results [2]int
	if err := unix.Pipe2(results[:], 0); err != nil {
		return nil, err
	}
	s := &script{n: copy(new(script).steps[:], steps), gate: uintptr(faulting.gate[0]), out: uintptr(results[1])}
	copy(s.steps[:], steps)
	copy(s.pagemap[:], pagemapPath)
	s.page = uint64(os.Getpagesize())

	// The child keeps all signals blocked: none runs a handler of the Go runtime
	// there, and one that an access raises ends it.
	var all, old unix.Sigset_t
	for i := range all.Val {
		all.Val[i]--
	}
	runtime.LockOSThread()
	err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old)
	if err != nil {
		return nil, err
	}
	pid, errno := rawFork(s)
	err = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
	runtime.UnlockOSThread()
	if err != nil {
		return nil, err
	}
	faulting.forks.Add(1)
	unix.Close(results[1])
	defer unix.Close(results[0])
	if errno != 0 {
		return nil, errno
	}
	buf := make([]byte, 8*len(steps))
	for n := 0; n < len(buf); {
		k, err := unix.Read(results[0], buf[n:])
		if err == unix.EINTR {
			continue
		}
		if k <= 0 || err != nil {
			var status unix.WaitStatus
			unix.Wait4(int(pid), &status, 0, nil)
			if status.Signaled() {
				return []uint64{uint64(pid)}, ErrSigbus
			}
			return nil, fmt.Errorf("the forked process ended early: status %#x, %v", status, err)
		}
		n += k
	}
	if _, err := unix.Wait4(int(pid), nil, 0, nil); err != nil {
		return nil, err
	}
	values := []uint64{uint64(pid)}
	for i := range steps {
		values = append(values, binary.NativeEndian.Uint64(buf[8*i:]))
	}
	return values, nil
}

//go:norace
func rawFork(s *script) (uintptr, syscall.Errno) {
	flags, stack := uintptr(unix.SIGCHLD), uintptr(0)
	if runtime.GOARCH == "s390x" {
		flags, stack = stack, flags
	}
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, flags, stack, 0, 0, 0, 0)
	if pid == 0 && errno == 0 {
		s.run()
	}
	return pid, errno
}

// run does the steps and exits. It must not touch the runtime: no allocation, no
// growth of the stack, no lock.
//
//go:nosplit
//go:norace
func (s *script) run() {
	for i := 0; i < s.n; i++ {
		step := &s.steps[i]
		a := &step.Args
		var v uintptr
		var errno syscall.Errno
		switch step.Op {
		case StepLoad:
			v = uintptr(*(*byte)(rawAt(a[0])))
		case StepStore:
			*(*byte)(rawAt(a[0])) = byte(a[1])
		case StepCheck:
			v = uintptr(differing(rawAt(a[0]), a[1], byte(a[2])))
		case StepMadvise:
			_, _, errno = unix.RawSyscall(unix.SYS_MADVISE, uintptr(a[0]), uintptr(a[1]), uintptr(a[2]))
		case StepMunmap:
			_, _, errno = unix.RawSyscall(unix.SYS_MUNMAP, uintptr(a[0]), uintptr(a[1]), 0)
		case StepMremap:
			v, _, errno = unix.RawSyscall6(unix.SYS_MREMAP, uintptr(a[0]), uintptr(a[1]), uintptr(a[2]), uintptr(a[3]), uintptr(a[4]), 0)
		case StepGate:
			var b [1]byte
			_, _, errno = unix.RawSyscall(unix.SYS_READ, s.gate, uintptr(unsafe.Pointer(&b)), 1)
		case StepPagemap:
			if errno = s.readPagemap(a[0], &s.results[i]); errno == 0 {
				continue
			}
		}
		s.results[i] = uint64(v)
		if errno != 0 {
			s.results[i] = ^uint64(0)
		}
	}
	unix.RawSyscall(unix.SYS_WRITE, s.out, uintptr(unsafe.Pointer(&s.results)), uintptr(8*s.n))
	unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
}

//go:nosplit
//go:norace
func (s *script) readPagemap(a uint64, entry *uint64) syscall.Errno {
	const cwd = ^uintptr(99) // AT_FDCWD
	fd, _, errno := unix.RawSyscall6(unix.SYS_OPENAT, cwd, uintptr(unsafe.Pointer(&s.pagemap)), unix.O_RDONLY, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	_, _, errno = unix.RawSyscall(unix.SYS_LSEEK, fd, uintptr(a/s.page*8), 0)
	if errno == 0 {
		_, _, errno = unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(entry)), 8)
	}
	unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0)
	return errno
}

//go:nosplit
func rawAt(a uint64) unsafe.Pointer {
	p := uintptr(a)
	return *(*unsafe.Pointer)(unsafe.Pointer(&p))
}
