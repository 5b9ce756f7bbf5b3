package uffd

import (
	"errors"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A reader reads messages, and waits for them in Go's poller. What it needs is
// made once, so that reading does not allocate.
type reader struct {
	mu    sync.Mutex // serializes readers; held while waiting
	try   func(fd uintptr) bool
	buf   [16]Msg
	iov   unix.Iovec // first part of buf
	room  int        // messages wanted
	block bool       // wait if there is none

	n     int        // messages read
	errno unix.Errno // why reading failed
	tries int        // calls of try
	eager bool       // the last message did not have to be waited for
	plain bool       // the kernel has no RWF_NOWAIT for userfaultfd
}

func newReader() *reader {
	r := new(reader)
	r.try = r.tryRead
	r.iov.Base = (*byte)(unsafe.Pointer(&r.buf))
	return r
}

func (f *File) readMsgs(msgs []Msg) (int, error) {
	r := f.reader
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for {
		r.room, r.block = min(len(msgs)-n, len(r.buf)), n == 0
		r.n, r.errno, r.tries = 0, 0, 0
		var err error
		if !r.eager || !f.readAtOnce() {
			err = f.wait(opReadMsg, r.try)
			r.eager = r.tries == 1
		}
		if err == nil && r.errno != 0 {
			err = errnoError(opReadMsg, r.errno)
		}
		n += copy(msgs[n:], r.buf[:r.n])
		if err == nil && r.n == len(r.buf) && n < len(msgs) {
			continue // there may be more
		}
		if n > 0 {
			return n, nil // an error will come again
		}
		return 0, err
	}
}

// readAtOnce reads what there is without the poller, whose bookkeeping takes as
// long as reading. It reports false if the poller has to be asked.
func (f *File) readAtOnce() bool {
	if f.deadline.over() || !f.calls.TryRLock() { // Close does not wait for readers, nor they for what it waits for
		return false
	}
	defer f.end()
	return f.state.Load() == stateReady && f.reader.tryRead(uintptr(f.fd))
}

// tryRead reads what there is. It reports false if the poller has to wait.
func (r *reader) tryRead(fd uintptr) bool {
	r.tries++
	for {
		n, e := r.read(fd)
		switch e {
		case 0:
			r.n = int(n) / msgSize
			return true
		case unix.EINTR: // a signal is pending
		case unix.EAGAIN:
			return !r.block
		default:
			r.errno = e
			return true
		}
	}
}

// read must not block, whatever becomes of the flags of an open file that others
// hold too.
func (r *reader) read(fd uintptr) (uintptr, unix.Errno) {
	r.iov.SetLen(r.room * msgSize)
	if !r.plain {
		const current = ^uintptr(0) // offset -1, in two halves
		n, _, e := unix.RawSyscall6(unix.SYS_PREADV2, fd, uintptr(unsafe.Pointer(&r.iov)), 1, current, current, unix.RWF_NOWAIT)
		switch e {
		default:
			return n, e
		case unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL, unix.EPERM: // an old kernel, or a seccomp filter
			r.plain = true
		}
	}
	if e := setNonblock(int(fd)); e != 0 {
		return 0, e
	}
	n, _, e := unix.Syscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(r.iov.Base)), uintptr(r.iov.Len))
	return n, e
}

// wait calls try when the descriptor is readable until try reports true.
func (f *File) wait(op op, try func(fd uintptr) bool) error {
	p, err := f.joinPoller(op)
	if err != nil {
		return err
	}
	for {
		err := p.conn.Read(try)
		switch {
		case err == nil:
			return nil
		case f.state.Load() != stateReady:
			return refusalClosed.error(op)
		case errors.Is(err, os.ErrDeadlineExceeded):
			return refusalDeadline.error(op)
		}
		// Somebody who shares the open file has cleared O_NONBLOCK, which
		// userfaultfd reports to the poller as an error. That is over when a message
		// comes that the poller sees; until then look for messages here.
		if done, err := f.waitUnpolled(op, try); done || err != nil {
			return err
		}
	}
}

// unpolledWait bounds how late waitUnpolled notices a deadline or Close.
const unpolledWait = 10 * time.Millisecond

func (f *File) waitUnpolled(op op, try func(fd uintptr) bool) (done bool, err error) {
	if err := f.begin(op); err != nil {
		return false, err
	}
	defer f.end()
	if e := setNonblock(f.fd); e != 0 {
		return false, errnoError(op, e)
	}
	ready := [1]unix.PollFd{{Fd: int32(f.fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(ready[:], int(unpolledWait/time.Millisecond)); err != nil && err != unix.EINTR {
		return false, errnoError(op, err.(unix.Errno))
	}
	return try(uintptr(f.fd)), nil
}
