package track

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

// readMemory reads another process's memory.
func readMemory(pid int, p []byte, a uffd.Addr) error {
	if uint64(uintptr(a)) != uint64(a) {
		return invalid(fmt.Sprintf("%v is out of reach of a 32-bit program", a))
	}
	local := [1]unix.Iovec{{Base: &p[0]}}
	local[0].SetLen(len(p))
	remote := [1]unix.RemoteIovec{{Base: uintptr(a), Len: len(p)}}
	n, err := unix.ProcessVMReadv(pid, local[:], remote[:], 0)
	if err == nil && n < len(p) {
		err = unix.EFAULT
	}
	switch err {
	case nil:
		return nil
	case unix.ESRCH:
		return fmt.Errorf("%w: %w", uffd.ErrGone, err)
	}
	return fmt.Errorf("reading %v of process %d: %w", a+uffd.Addr(max(n, 0)), pid, err)
}

// readable reports whether a message waits.
func readable(f *uffd.File) (yes bool) {
	conn, err := f.SyscallConn()
	if err != nil {
		return true // reading says why
	}
	err = conn.Control(func(fd uintptr) {
		fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			if _, err := unix.Poll(fds[:], 0); err != unix.EINTR {
				break
			}
		}
		yes = fds[0].Revents != 0
	})
	return yes || err != nil
}
