package pager

import (
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

// NewState makes an empty file for [Pager.AttachState]: a memfd (memfd_create(2)).
func NewState() (*os.File, error) {
	fd, err := unix.MemfdCreate("uffd pager state", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return os.NewFile(uintptr(fd), "pager state"), nil
}

// openLedger maps the ledger in a file, of which it keeps an open file of its
// own: the lock belongs to that, and ends with this process.
func openLedger(state *os.File, homes []Region) (l *ledger, err error) {
	file, err := reopen(state)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	fd := int(file.Fd())
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("another client uses it: %w", err)
	}
	_, _, _, size := ledgerLayout(homes)
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	switch info.Size() {
	case int64(size):
	case 0:
		if err := file.Truncate(int64(size)); err != nil {
			return nil, err
		}
		// Nobody can take the memory away. Files other than memfds do without.
		unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW)
	default:
		return nil, fmt.Errorf("it is of other regions, or damaged: %d bytes, not %d: %w", info.Size(), size, syscall.EINVAL)
	}
	if uint64(int(size)) != size {
		return nil, fmt.Errorf("too large to be mapped: %w", syscall.ENOMEM)
	}
	mem, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	defer func() {
		if err != nil {
			unix.Munmap(mem)
		}
	}()
	// The kernel copies messages there, and has lost them if it has to wait for
	// a page while the process is being killed.
	if err := unix.Mlock(mem[:unsafe.Sizeof(ledgerHead{})]); err != nil {
		return nil, os.NewSyscallError("mlock", err)
	}
	l, err = newLedger(mem, homes)
	if err != nil {
		return nil, err
	}
	l.file = file
	return l, nil
}

// reopen opens a file anew, with locks of its own.
func reopen(f *os.File) (*os.File, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var file *os.File
	controlErr := conn.Control(func(fd uintptr) {
		file, err = os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_RDWR, 0)
	})
	if controlErr != nil {
		return nil, controlErr
	}
	return file, err
}

func (l *ledger) close() {
	unix.Munmap(l.mem)
	l.file.Close()
}

// A ledgerReader reads messages into the ledger.
type ledgerReader struct {
	conn  syscall.RawConn
	try   func(fd uintptr) bool
	iov   unix.Iovec
	plain bool // the kernel has no RWF_NOWAIT for userfaultfd
	n     int
	errno syscall.Errno
}

func (l *ledger) readFrom(f *uffd.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	r := &ledgerReader{conn: conn}
	r.try = r.tryRead
	r.iov.Base = (*byte)(unsafe.Pointer(&l.head.msgs))
	r.iov.SetLen(int(unsafe.Sizeof(l.head.msgs)))
	l.reader = r
	return nil
}

// read waits for messages.
func (l *ledger) read() ([]uffd.Msg, error) {
	r := l.reader
	r.n, r.errno = 0, 0
	if err := r.conn.Read(r.try); err != nil {
		return nil, err
	}
	if r.errno != 0 {
		return nil, os.NewSyscallError("read", r.errno)
	}
	return l.head.msgs[:r.n/int(unsafe.Sizeof(l.head.msgs[0]))], nil
}

func (r *ledgerReader) tryRead(fd uintptr) (over bool) {
	for {
		var n uintptr
		var e syscall.Errno
		if r.plain {
			if err := unix.SetNonblock(int(fd), true); err != nil {
				r.errno = err.(syscall.Errno)
				return true
			}
			n, _, e = unix.Syscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(r.iov.Base)), uintptr(r.iov.Len))
		} else {
			const current = ^uintptr(0) // offset -1, in two halves
			n, _, e = unix.Syscall6(unix.SYS_PREADV2, fd, uintptr(unsafe.Pointer(&r.iov)), 1, current, current, unix.RWF_NOWAIT)
		}
		switch e {
		case 0:
			r.n = int(n)
			return true
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		case unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL, unix.EPERM:
			if !r.plain { // an old kernel, or a seccomp filter
				r.plain = true
				continue
			}
			fallthrough
		default:
			r.errno = e
			return true
		}
	}
}
