package handoff

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

// bound has the waits of a connection end when ctx does. The function that it
// returns ends that; it returns err, or why ctx ended if that is what err comes
// from.
func bound(ctx context.Context, setDeadline func(time.Time) error) (release func(err error) error) {
	over := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(over)
		setDeadline(time.Unix(1, 0))
	})
	return func(err error) error {
		if stop() {
			return err
		}
		<-over
		setDeadline(time.Time{})
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return context.Cause(ctx)
		}
		return err
	}
}

// send sends data and a duplicate of f.
func send(ctx context.Context, conn *net.UnixConn, f *uffd.File, data []byte) error {
	fd, err := duplicate(f)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	release := bound(ctx, conn.SetWriteDeadline)
	n, _, err := conn.WriteMsgUnix(data, unix.UnixRights(fd), nil)
	if err == nil && n < len(data) {
		_, err = conn.Write(data[n:])
	}
	return release(err)
}

// duplicate makes a descriptor that can be used without holding up f's Close.
func duplicate(f *uffd.File) (int, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	var dup int
	var dupErr error
	if err := conn.Control(func(fd uintptr) { dup, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return -1, err
	}
	return dup, os.NewSyscallError("fcntl", dupErr)
}

// write sends data alone.
func write(ctx context.Context, conn *net.UnixConn, data []byte) error {
	release := bound(ctx, conn.SetWriteDeadline)
	_, err := conn.Write(data)
	return release(err)
}

// receive has decode read a message. It returns the userfaultfd that came with it,
// if one is wanted.
func receive(ctx context.Context, conn *net.UnixConn, wanted bool, decode func(io.Reader) error) (*uffd.File, error) {
	release := bound(ctx, conn.SetReadDeadline)
	r := &receiver{conn: conn, fd: -1}
	err := decode(r)
	r.err = release(r.err)
	switch {
	case err == nil:
	case r.err == io.EOF:
		err = fmt.Errorf("handoff: receiving: the peer hung up: %w", io.ErrUnexpectedEOF)
	case r.err != nil:
		err = fmt.Errorf("handoff: receiving: %w", r.err)
	default:
		err = &MessageError{err}
	}
	if err != nil || !wanted {
		r.drop()
		return nil, err
	}
	return r.adopt()
}

// A receiver reads from a connection, and keeps the first descriptor that comes on
// the way.
type receiver struct {
	conn *net.UnixConn
	fd   int   // -1: none yet
	err  error // the connection's
	oob  [controlSize]byte
}

// controlSize has room for as many descriptors as one message can carry (253), and
// for what else a socket may have been told to report.
const controlSize = 2048

func (r *receiver) Read(p []byte) (int, error) {
	if len(p) == 0 || r.err != nil {
		return 0, r.err
	}
	// ReadMsgUnix makes the descriptors close-on-exec.
	n, oobn, flags, _, err := r.conn.ReadMsgUnix(p, r.oob[:])
	r.keep(r.oob[:oobn])
	switch {
	case errors.Is(err, io.EOF):
		err = io.EOF
	case err != nil:
	case flags&unix.MSG_CTRUNC != 0:
		err = errors.New("the kernel dropped descriptors that came: is there none free? Close some, or raise the limit (RLIMIT_NOFILE)")
	case flags&unix.MSG_TRUNC != 0:
		err = errors.New("the peer sent a longer message than there is room for")
	case n == 0:
		err = io.EOF
	}
	if err != nil {
		r.err = err
		return 0, err
	}
	return n, nil
}

// keep takes the descriptors out of control messages, and closes all but the first.
func (r *receiver) keep(oob []byte) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil { // the kernel makes no such thing
		return
	}
	for _, m := range messages {
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SCM_RIGHTS && m.Header.Type != unix.SCM_PIDFD {
			continue
		}
		rights := m.Header.Type == unix.SCM_RIGHTS
		m.Header.Type = unix.SCM_RIGHTS // a pidfd has the same form
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			switch {
			case fd < 0: // in place of a pidfd
			case rights && r.fd < 0:
				r.fd = fd
			default:
				unix.Close(fd)
			}
		}
	}
}

// drop closes the descriptor.
func (r *receiver) drop() {
	if r.fd >= 0 {
		unix.Close(r.fd)
		r.fd = -1
	}
}

// adopt makes a File of the descriptor.
func (r *receiver) adopt() (*uffd.File, error) {
	if r.fd < 0 {
		return nil, &MessageError{errors.New("no descriptor came with it")}
	}
	f, err := uffd.FromFD(r.fd)
	if err == nil {
		return f, nil
	}
	defer r.drop()
	if errors.Is(err, unix.EBADF) {
		what, linkErr := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", r.fd))
		if linkErr == nil {
			err = fmt.Errorf("%w (it is %q)", err, what)
		}
	}
	return nil, &MessageError{fmt.Errorf("the descriptor that came with it: %w", err)}
}

func peerPid(conn *net.UnixConn) (int, error) {
	var cred *unix.Ucred
	err := control(conn, func(fd int) (err error) {
		cred, err = unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		return os.NewSyscallError("getsockopt", err)
	})
	if err != nil {
		return 0, fmt.Errorf("handoff: asking for the peer: %w", err)
	}
	if cred.Pid == 0 {
		return 0, errors.New("handoff: the peer has no pid here: the socket is not connected, or the peer is outside of this pid namespace")
	}
	return int(cred.Pid), nil
}

func openPeer(conn *net.UnixConn) (*os.File, error) {
	pidfd := -1
	err := control(conn, func(fd int) (err error) {
		pidfd, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		return os.NewSyscallError("getsockopt", err)
	})
	if errors.Is(err, unix.ENOPROTOOPT) {
		pid, pidErr := peerPid(conn)
		if pidErr != nil {
			return nil, pidErr
		}
		pidfd, err = unix.PidfdOpen(pid, 0)
		err = os.NewSyscallError("pidfd_open", err)
	}
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL):
		return nil, fmt.Errorf("handoff: opening the peer: %w (%w)", os.ErrProcessDone, err)
	case err != nil:
		return nil, fmt.Errorf("handoff: opening the peer: %w", err)
	}
	if err := unix.SetNonblock(pidfd, true); err != nil { // so that Go's poller takes it
		unix.Close(pidfd)
		return nil, fmt.Errorf("handoff: opening the peer: %w", os.NewSyscallError("fcntl", err))
	}
	return os.NewFile(uintptr(pidfd), "pidfd"), nil
}

func control(conn *net.UnixConn, do func(fd int) error) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	if err := raw.Control(func(fd uintptr) { doErr = do(int(fd)) }); err != nil {
		return err
	}
	return doErr
}
