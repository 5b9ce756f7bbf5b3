//go:build linux

// Package twin starts the program again, as a second process whose memory the
// first one serves. The second passes its userfaultfd over a unix socket.
package twin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

const (
	roleVariable = "UFFD_EXAMPLE_ROLE"
	socket       = 3 // in the second process
)

// Second reports whether this is the second process.
func Second() bool { return os.Getenv(roleVariable) == "second" }

// A Process is the second process, seen from the first.
type Process struct {
	*exec.Cmd
	socket int
	wait   func() error
}

// Wait waits until the process has exited.
func (p *Process) Wait() error { return p.wait() }

// Start starts the second process. It dies with the first.
func Start(stdout *os.File, args ...string) (*Process, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs := os.NewFile(uintptr(pair[1]), "socket")
	defer theirs.Close()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleVariable+"=second")
	cmd.Stdout, cmd.Stderr = stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		unix.Close(pair[0])
		return nil, err
	}
	return &Process{cmd, pair[0], sync.OnceValue(cmd.Wait)}, nil
}

// Send hands f and the range that is registered with it to the first process, and
// waits until that is ready to serve.
func Send(f *uffd.File, r uffd.Range) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	message := binary.NativeEndian.AppendUint64(nil, uint64(r.Start))
	message = binary.NativeEndian.AppendUint64(message, r.Len)
	var sent error
	err = conn.Control(func(fd uintptr) { sent = unix.Sendmsg(socket, message, unix.UnixRights(int(fd)), nil, 0) })
	if err = errors.Join(err, sent); err != nil {
		return err
	}
	_, err = unix.Read(socket, make([]byte, 1))
	return err
}

// Receive receives what the second process sends.
func (p *Process) Receive() (*uffd.File, uffd.Range, error) {
	message, oob := make([]byte, 16), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(p.socket, message, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, uffd.Range{}, err
	}
	control, err := unix.ParseSocketControlMessage(oob[:oobn])
	if n != len(message) || err != nil || len(control) != 1 {
		return nil, uffd.Range{}, fmt.Errorf("the second process failed to send its userfaultfd")
	}
	fds, err := unix.ParseUnixRights(&control[0])
	if err != nil {
		return nil, uffd.Range{}, err
	}
	f, err := uffd.FromFD(fds[0])
	if err != nil {
		unix.Close(fds[0])
		return nil, uffd.Range{}, err
	}
	return f, uffd.Range{
		Start: uffd.Addr(binary.NativeEndian.Uint64(message)),
		Len:   binary.NativeEndian.Uint64(message[8:]),
	}, nil
}

// Continue lets the second process go on after Send.
func (p *Process) Continue() error {
	_, err := unix.Write(p.socket, []byte{0})
	return err
}

// Release kills the second process, if it still runs, and frees what Start made.
func (p *Process) Release() {
	p.Process.Kill()
	p.Wait()
	unix.Close(p.socket)
}
