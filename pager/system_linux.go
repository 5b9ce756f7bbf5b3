package pager

import (
	"os"

	"golang.org/x/sys/unix"
)

// readable reports whether a message waits.
func (c *Client) readable() (yes bool) {
	conn, err := c.file.SyscallConn()
	if err != nil {
		return true // reading says why
	}
	err = conn.Control(func(fd uintptr) {
		yes = poll(fd, unix.POLLIN) != 0
	})
	return yes || err != nil
}

// poll returns what a descriptor is ready for.
func poll(fd uintptr, events int16) int16 {
	fds := [1]unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		_, err := unix.Poll(fds[:], 0)
		if err != unix.EINTR {
			return fds[0].Revents
		}
	}
}

// waitHangup waits for the end of a peer, or its read deadline. It reports which
// it was.
func waitHangup(p Peer) (hungUp bool) {
	conn, err := p.SyscallConn()
	if err != nil {
		return false
	}
	conn.Read(func(fd uintptr) bool {
		ready := poll(fd, unix.POLLIN|unix.POLLRDHUP)
		// A pidfd is readable then, a connection says that it is shut down.
		hungUp = ready&(unix.POLLHUP|unix.POLLRDHUP|unix.POLLERR) != 0 || ready&unix.POLLIN != 0 && isPidfd(fd)
		return hungUp
	})
	return hungUp
}

// isPidfd tells a pidfd from a connection: only that has no options.
func isPidfd(fd uintptr) bool {
	_, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE)
	return err == unix.ENOTSOCK
}

// OpenPid returns a pidfd of a process, for [Client.Watch] (pidfd_open(2), Linux
// 5.3).
func OpenPid(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // so that it can be waited for
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

func closeFD(fd int) { unix.Close(fd) }

// discard makes a hole of shared memory.
func discard(mem []byte) error { return unix.Madvise(mem, unix.MADV_REMOVE) }
