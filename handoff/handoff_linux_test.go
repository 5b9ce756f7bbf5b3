package handoff

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

func TestMain(m *testing.M) {
	uffdtest.Main(m, uffdtest.Role{Name: "connect", Run: connectRole})
}

// pair returns connected sockets.
func pair(t testing.TB, kind int) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "socket")
		defer file.Close()
		c, err := net.FileConn(file)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

// open returns a userfaultfd of this process, on which nothing is registered.
func open(t testing.TB) *uffd.File {
	t.Helper()
	f, err := uffd.New(&uffd.Config{Prefer: uffd.FeatureEventRemove})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func fdOf(t testing.TB, f *uffd.File) int {
	t.Helper()
	fd := -1
	conn, err := f.SyscallConn()
	if err == nil {
		err = conn.Control(func(n uintptr) { fd = int(n) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// sendRaw sends bytes with any descriptors.
func sendRaw(t testing.TB, conn *net.UnixConn, data string, fds ...int) {
	t.Helper()
	if _, _, err := conn.WriteMsgUnix([]byte(data), unix.UnixRights(fds...), nil); err != nil {
		t.Fatal(err)
	}
}

// patient bounds what must not take long.
func patient(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), uffdtest.Patience)
	t.Cleanup(cancel)
	return ctx
}

// openFDs returns how many descriptors the process has.
func openFDs(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// leaks returns a function that fails the test if other than the descriptors of now
// are open.
func leaks(t testing.TB) func() {
	t.Helper()
	before := openFDs(t)
	return func() {
		t.Helper()
		if after := openFDs(t); after != before {
			t.Errorf("%d descriptors are open, %d were before", after, before)
		}
	}
}

// openRaw returns a userfaultfd that has not been through API, and its number.
func openRaw(t testing.TB) (*uffd.File, int) {
	t.Helper()
	names := func() (list []string) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if what, _ := os.Readlink("/proc/self/fd/" + e.Name()); what == "anon_inode:[userfaultfd]" {
				list = append(list, e.Name())
			}
		}
		return list
	}
	before := names()
	f, err := uffd.Open(uffd.BestFaults)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names() {
		if fd, err := strconv.Atoi(name); err == nil && !slices.Contains(before, name) {
			return f, fd
		}
	}
	t.Fatal("/proc/self/fd has no userfaultfd")
	return nil, 0
}

// same checks that f is a userfaultfd like the one that was sent.
func same(t testing.TB, f, sent *uffd.File) {
	t.Helper()
	if f.Features() != sent.Features() {
		t.Errorf("received %v, sent %v", f.Features(), sent.Features())
	}
	flags, err := unix.FcntlInt(uintptr(fdOf(t, f)), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v: not close-on-exec", flags, err)
	}
}

func TestSendReceive(t *testing.T) {
	for name, kind := range map[string]int{"stream": unix.SOCK_STREAM, "seqpacket": unix.SOCK_SEQPACKET, "dgram": unix.SOCK_DGRAM} {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t, kind)
			f := open(t)
			defer leaks(t)()
			for range 3 {
				if err := Send(patient(t), a, f, []byte("hello")); err != nil {
					t.Fatal(err)
				}
			}
			for range 3 {
				data := make([]byte, 5)
				got, err := Receive(patient(t), b, data)
				if err != nil || string(data) != "hello" {
					t.Fatalf("received %q, %v", data, err)
				}
				same(t, got, f)
				got.Close()
			}
		})
	}
}

func TestSendRefuses(t *testing.T) {
	before := openFDs(t)
	a, b := pair(t, unix.SOCK_STREAM)
	f := open(t)
	if err := Send(patient(t), a, f, nil); err == nil {
		t.Error("sent no data")
	}
	if err := SendFirecracker(patient(t), a, f, nil); err == nil {
		t.Error("sent no regions")
	}
	if _, err := Receive(patient(t), a, nil); err == nil {
		t.Error("received no data")
	}
	closed, err := uffd.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	if err := Send(patient(t), a, closed, []byte{0}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("sending a closed File: %v", err)
	}
	a.Close()
	if err := Send(patient(t), a, f, []byte{0}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("sending over a closed connection: %v", err)
	}
	if _, err := Receive(patient(t), a, []byte{0}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("receiving from a closed connection: %v", err)
	}
	b.Close()
	f.Close()
	if after := openFDs(t); after != before {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
}

// TestPieces sends a message in pieces, with the descriptor in any of them.
func TestPieces(t *testing.T) {
	f := open(t)
	text := firecrackerMessages[0].message
	for _, step := range []int{1, 7, 100} {
		for _, with := range []int{0, 1, len(text)/step - 1} {
			t.Run(fmt.Sprintf("%d bytes, descriptor in piece %d", step, with), func(t *testing.T) {
				a, b := pair(t, unix.SOCK_STREAM)
				defer leaks(t)()
				go func() {
					for i, piece := range pieces(text, step) {
						if i == with {
							sendRaw(t, a, piece, fdOf(t, f))
						} else {
							sendRaw(t, a, piece)
						}
					}
				}()
				got, regions, err := ReceiveFirecracker(patient(t), b, 0x6000)
				if err != nil || !slices.Equal(regions, firecrackerMessages[0].want) {
					t.Fatalf("got %v, %v", regions, err)
				}
				same(t, got, f)
				got.Close()
			})
		}
	}
}

func pieces(text string, step int) (list []string) {
	for len(text) > 0 {
		n := min(step, len(text))
		list, text = append(list, text[:n]), text[n:]
	}
	return list
}

func TestReceiveReadsNoFurther(t *testing.T) {
	a, b := pair(t, unix.SOCK_STREAM)
	f := open(t)
	defer leaks(t)()
	sendRaw(t, a, "abcdef", fdOf(t, f))
	data := make([]byte, 3)
	got, err := Receive(patient(t), b, data)
	if err != nil || string(data) != "abc" {
		t.Fatalf("received %q, %v", data, err)
	}
	got.Close()
	if n, err := b.Read(data); n != 3 || string(data) != "def" {
		t.Errorf("%q is left, %v", data[:n], err)
	}
}

// TestWrongPeers receives from peers that send anything but what they should.
func TestWrongPeers(t *testing.T) {
	f := open(t)
	pipe := make([]int, 2)
	if err := unix.Pipe2(pipe, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	raw, rawFD := openRaw(t)
	defer raw.Close()
	good := firecrackerMessages[0].message
	hangUp := func(a *net.UnixConn) { a.Close() }
	for _, test := range []struct {
		name string
		kind int
		send func(t *testing.T, a *net.UnixConn)
		want string
		is   error
	}{
		{"no descriptor", unix.SOCK_STREAM, func(t *testing.T, a *net.UnixConn) { sendRaw(t, a, good) }, "no descriptor", nil},
		{"a pipe", unix.SOCK_STREAM, func(t *testing.T, a *net.UnixConn) { sendRaw(t, a, good, pipe[0]) }, `it is "pipe:`, unix.EBADF},
		{"a pipe first", unix.SOCK_STREAM, func(t *testing.T, a *net.UnixConn) { sendRaw(t, a, good, pipe[0], fdOf(t, f)) }, `it is "pipe:`, unix.EBADF},
		{"a userfaultfd before API", unix.SOCK_STREAM, func(t *testing.T, a *net.UnixConn) { sendRaw(t, a, good, rawFD) }, "API", unix.EINVAL},
		{"bad text", unix.SOCK_STREAM, func(t *testing.T, a *net.UnixConn) { sendRaw(t, a, "hello", fdOf(t, f), pipe[0]) }, "not Firecracker's", nil},
		{"bad regions", unix.SOCK_STREAM, func(t *testing.T, a *net.UnixConn) { sendRaw(t, a, "[]", fdOf(t, f)) }, "no regions", nil},
		{"nothing", unix.SOCK_STREAM, func(t *testing.T, a *net.UnixConn) { hangUp(a) }, "hung up", io.ErrUnexpectedEOF},
		{"half a message", unix.SOCK_STREAM, func(t *testing.T, a *net.UnixConn) { sendRaw(t, a, good[:50], fdOf(t, f)); hangUp(a) }, "hung up", io.ErrUnexpectedEOF},
		{"an empty datagram", unix.SOCK_DGRAM, func(t *testing.T, a *net.UnixConn) { sendRaw(t, a, "", fdOf(t, f), pipe[0]) }, "hung up", io.ErrUnexpectedEOF},
		{"a long packet", unix.SOCK_SEQPACKET, func(t *testing.T, a *net.UnixConn) { sendRaw(t, a, strings.Repeat(" ", 10_000)+good, fdOf(t, f)) }, "longer message", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := openFDs(t)
			a, b := pair(t, test.kind)
			test.send(t, a)
			got, regions, err := ReceiveFirecracker(patient(t), b, 0x6000)
			if err == nil || got != nil || regions != nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, %v, %v, want an error with %q", got, regions, err, test.want)
			}
			if test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("%v is not %v", err, test.is)
			}
			var message *MessageError
			hungUp := errors.Is(err, io.ErrUnexpectedEOF)
			if lost := test.want == "longer message"; errors.As(err, &message) == (hungUp || lost) {
				t.Errorf("%v is a %T", err, err)
			}
			a.Close()
			b.Close()
			if after := openFDs(t); after != before {
				t.Errorf("%d descriptors are open, %d were before", after, before)
			}
		})
	}
}

func TestExtraDescriptorsAreClosed(t *testing.T) {
	f := open(t)
	good := firecrackerMessages[0].message
	for _, extra := range []int{1, 2, 252} { // 253 is what one message can carry
		t.Run(fmt.Sprint(extra), func(t *testing.T) {
			a, b := pair(t, unix.SOCK_STREAM)
			defer leaks(t)()
			fds := slices.Repeat([]int{fdOf(t, f)}, 1+extra)
			sendRaw(t, a, good[:10], fds...)
			sendRaw(t, a, good[10:20])
			sendRaw(t, a, good[20:], fds...)
			got, _, err := ReceiveFirecracker(patient(t), b, 0x6000)
			if err != nil {
				t.Fatal(err)
			}
			same(t, got, f)
			got.Close()
		})
	}
	t.Run("pidfd", func(t *testing.T) {
		uffdtest.RequireKernel(t, 6, 5, "SO_PASSPIDFD")
		a, b := pair(t, unix.SOCK_STREAM)
		for _, option := range []int{unix.SO_PASSPIDFD, unix.SO_PASSCRED} {
			err := control(b, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, 1) })
			if err != nil {
				t.Fatal(err)
			}
		}
		defer leaks(t)()
		sendRaw(t, a, good, fdOf(t, f))
		got, _, err := ReceiveFirecracker(patient(t), b, 0x6000)
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, f)
		got.Close()
	})
}

// TestNoDescriptorFree has the kernel drop a part of the descriptors that come.
func TestNoDescriptorFree(t *testing.T) {
	f := open(t)
	a, b := pair(t, unix.SOCK_STREAM)
	defer leaks(t)()
	fd := fdOf(t, f)
	sendRaw(t, a, firecrackerMessages[0].message, fd, fd, fd, fd)

	lowest, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(lowest)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(lowest) + 2, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	_, _, err = ReceiveFirecracker(patient(t), b, 0x6000)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err == nil || !strings.Contains(err.Error(), "RLIMIT_NOFILE") {
		t.Errorf("got %v", err)
	}
}

func TestWaitsEnd(t *testing.T) {
	f := open(t)
	cause := errors.New("cause")
	cancelled := func() context.Context {
		ctx, cancel := context.WithCancelCause(context.Background())
		time.AfterFunc(10*time.Millisecond, func() { cancel(cause) })
		return ctx
	}
	t.Run("context", func(t *testing.T) {
		a, b := pair(t, unix.SOCK_STREAM)
		defer leaks(t)()
		if _, err := Receive(cancelled(), b, make([]byte, 1)); !errors.Is(err, cause) {
			t.Errorf("Receive: %v", err)
		}
		if err := Send(patient(t), a, f, []byte{1}); err != nil {
			t.Fatal(err)
		}
		got, err := Receive(patient(t), b, make([]byte, 1))
		if err != nil {
			t.Fatalf("the deadline of the ended context is left: %v", err)
		}
		got.Close()

		// In the middle of a message, with its descriptor.
		sendRaw(t, a, "[", fdOf(t, f))
		if _, _, err := ReceiveFirecracker(cancelled(), b, 4096); !errors.Is(err, cause) {
			t.Errorf("ReceiveFirecracker: %v", err)
		}
	})
	t.Run("deadline", func(t *testing.T) {
		a, b := pair(t, unix.SOCK_STREAM)
		defer leaks(t)()
		b.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		sendRaw(t, a, "[", fdOf(t, f))
		if _, _, err := ReceiveFirecracker(patient(t), b, 4096); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("ReceiveFirecracker: %v", err)
		}
	})
	t.Run("ended before", func(t *testing.T) {
		_, b := pair(t, unix.SOCK_STREAM)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := Receive(ctx, b, make([]byte, 1)); !errors.Is(err, context.Canceled) {
			t.Errorf("Receive: %v", err)
		}
	})
	t.Run("sending", func(t *testing.T) {
		a, _ := pair(t, unix.SOCK_STREAM)
		if err := Send(cancelled(), a, f, make([]byte, 64<<20)); !errors.Is(err, cause) {
			t.Errorf("Send: %v", err)
		}
		err := control(a, func(fd int) (err error) {
			for err == nil {
				_, err = unix.Write(fd, make([]byte, 1))
			}
			return err
		})
		if err != unix.EAGAIN {
			t.Fatalf("filling the socket: %v", err)
		}
		if err := Send(cancelled(), a, f, make([]byte, 1)); !errors.Is(err, cause) {
			t.Errorf("Send to a full socket: %v", err)
		}
	})
	t.Run("closing", func(t *testing.T) {
		_, b := pair(t, unix.SOCK_STREAM)
		time.AfterFunc(10*time.Millisecond, func() { b.Close() })
		if _, err := Receive(context.Background(), b, make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Receive: %v", err)
		}
	})
}

// TestSendFirecracker checks what is sent, byte by byte, and that the largest
// message arrives.
func TestSendFirecracker(t *testing.T) {
	f := open(t)
	a, b := pair(t, unix.SOCK_STREAM)
	if err := SendFirecracker(patient(t), a, f, []Region{region(0x400000, 0x400000, 0, 2<<20), region(0x10000, 4096, 0x400000, 4096)}); err != nil {
		t.Fatal(err)
	}
	want := `[{"base_host_virt_addr":4194304,"size":4194304,"offset":0,"page_size":2097152,"page_size_kib":2097152},` +
		`{"base_host_virt_addr":65536,"size":4096,"offset":4194304,"page_size":4096,"page_size_kib":4096}]`
	data := make([]byte, len(want))
	got, err := Receive(patient(t), b, data)
	if err != nil || string(data) != want {
		t.Fatalf("sent %s, %v, want %s", data, err, want)
	}
	got.Close()

	var regions []Region
	for i := range maxRegions {
		regions = append(regions, region(uffd.Addr(i+1)<<40, 1<<20, int64(i)<<20, 4096))
	}
	sent := make(chan error, 1)
	go func() { sent <- SendFirecracker(patient(t), a, f, regions) }()
	got, received, err := ReceiveFirecracker(patient(t), b, maxRegions<<20)
	if err != nil || !slices.Equal(received, regions) {
		t.Errorf("received %d regions, %v", len(received), err)
	} else {
		got.Close()
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

func TestCloudHypervisor(t *testing.T) {
	f := open(t)
	a, b := pair(t, unix.SOCK_STREAM)
	defer leaks(t)()
	text := framed(chHandoff)
	sendRaw(t, a, text[:4], fdOf(t, f))
	sendRaw(t, a, text[4:]+framed(chAdd), fdOf(t, f))
	c, err := ReceiveCloudHypervisor(patient(t), b, 0x40000)
	if err != nil {
		t.Fatal(err)
	}
	same(t, c.File, f)
	c.File.Close()
	if !slices.Equal(c.Regions, chRegions) || c.Mode != "MISSING|WP" || c.Pid != 4242 {
		t.Errorf("received %+v", c)
	}
	if err := c.Acknowledge(patient(t)); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 2)
	if n, err := a.Read(answer); n != 1 || err != nil {
		t.Errorf("acknowledged with %d bytes, %v", n, err)
	}
	added, err := c.ReceiveRegion(patient(t))
	if added != chAdded || err != nil || !slices.Equal(c.Regions, append(slices.Clone(chRegions), chAdded)) {
		t.Errorf("added %+v, %v", added, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := c.ReceiveRegion(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting for a region: %v", err)
	}
	sendRaw(t, a, framed(chAdd), fdOf(t, f))
	var message *MessageError
	if _, err := c.ReceiveRegion(patient(t)); !errors.As(err, &message) {
		t.Errorf("adding the region again: %v", err)
	}
	defer leaks(t)()
	a.CloseWrite()
	if _, err := c.ReceiveRegion(patient(t)); err != io.EOF {
		t.Errorf("after the end: %v", err)
	}

	a, b = pair(t, unix.SOCK_STREAM)
	defer a.Close()
	defer b.Close()
	sendRaw(t, a, text)
	if _, err := ReceiveCloudHypervisor(patient(t), b, 0x40000); !errors.As(err, &message) {
		t.Errorf("without a descriptor: %v", err)
	}
}

// connectRole connects to a socket and stays until its input ends.
func connectRole() error {
	conn, err := net.Dial("unix", os.Getenv("UFFD_TEST_SOCKET"))
	if err != nil {
		return err
	}
	if os.Getenv("UFFD_TEST_LEAVE") == "" {
		io.Copy(io.Discard, os.Stdin)
	}
	return conn.Close()
}

func listen(t testing.TB) (*net.UnixListener, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetDeadline(time.Now().Add(uffdtest.Patience))
	t.Cleanup(func() { l.Close() })
	return l, path
}

func accept(t testing.TB, l *net.UnixListener) *net.UnixConn {
	t.Helper()
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// exited waits until the process of a pidfd has exited, at most for d.
func exited(pidfd *os.File, d time.Duration) error {
	pidfd.SetReadDeadline(time.Now().Add(d))
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Read(func(fd uintptr) bool {
		ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(ready, 0)
		return n > 0 && err == nil
	})
}

func TestPeer(t *testing.T) {
	uffdtest.RequireKernel(t, 5, 3, "pidfd_open")
	l, path := listen(t)
	cmd := uffdtest.Command("connect", "UFFD_TEST_SOCKET="+path)
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	conn := accept(t, l)
	if pid, err := PeerPid(conn); pid != cmd.Process.Pid || err != nil {
		t.Errorf("PeerPid = %d, %v, want %d", pid, err, cmd.Process.Pid)
	}
	pidfd, err := OpenPeer(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer pidfd.Close()
	if err := exited(pidfd, 20*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a running process: %v", err)
	}
	stdin.Close()
	if err := exited(pidfd, uffdtest.Patience); err != nil {
		t.Errorf("the process exits: %v", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func TestPeerThatHasExited(t *testing.T) {
	uffdtest.RequireKernel(t, 5, 3, "pidfd_open")
	l, path := listen(t)
	cmd := uffdtest.Command("connect", "UFFD_TEST_SOCKET="+path, "UFFD_TEST_LEAVE=1")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	conn := accept(t, l)
	defer leaks(t)()
	pidfd, err := OpenPeer(conn)
	if errors.Is(err, os.ErrProcessDone) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer pidfd.Close()
	if err := exited(pidfd, uffdtest.Patience); err != nil {
		t.Errorf("the pidfd of a process that has exited: %v", err)
	}
}

func TestPeerOfNothing(t *testing.T) {
	a, _ := pair(t, unix.SOCK_STREAM)
	if pid, err := PeerPid(a); pid != os.Getpid() || err != nil {
		t.Errorf("PeerPid of a pair = %d, %v, want %d", pid, err, os.Getpid())
	}
	unconnected, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "socket"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer unconnected.Close()
	if pid, err := PeerPid(unconnected); err == nil {
		t.Errorf("PeerPid of a socket without a peer = %d", pid)
	}
	if f, err := OpenPeer(unconnected); err == nil {
		t.Error("OpenPeer of a socket without a peer succeeds")
		f.Close()
	}
	a.Close()
	if _, err := PeerPid(a); !errors.Is(err, net.ErrClosed) {
		t.Errorf("PeerPid of a closed connection: %v", err)
	}
}

// handOver is what a VMM does: it registers memory and sends the userfaultfd to
// the handler at the address that is stored at a[2].
var _ = uffdtest.Handle("hand over", func(a []uint64) ([]uint64, error) {
	memory := uffd.Range{Start: uffd.Addr(a[0]), Len: a[1]}
	path := string(bytes.TrimRight(uffdtest.BytesAt(a[2], uint64(os.Getpagesize())), "\x00"))
	f, err := uffd.New(&uffd.Config{Prefer: uffd.FeatureEventRemove})
	if err != nil {
		return nil, err
	}
	if _, err := f.Register(memory, uffd.RegisterMissing); err != nil {
		return nil, err
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	half := memory.Len / 2
	return nil, SendFirecracker(context.Background(), conn.(*net.UnixConn), f, []Region{
		{Range: uffd.Range{Start: memory.Start, Len: half}},
		{Range: memory.Skip(int64(half)), Offset: int64(half)},
	})
})

// TestServe serves a process with what it handed over.
func TestServe(t *testing.T) {
	l, path := listen(t)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 8)
	address := p.Map(uffdtest.Anon, 1)
	for i := range path {
		p.Store(address.Start+uffd.Addr(i), path[i]).Value()
	}
	call := p.Run("hand over", uint64(mem.Start), mem.Len, uint64(address.Start))
	conn := accept(t, l)
	if pid, err := PeerPid(conn); pid != p.Pid || err != nil {
		t.Errorf("PeerPid = %d, %v, want %d", pid, err, p.Pid)
	}
	f, regions, err := ReceiveFirecracker(patient(t), conn, int64(mem.Len))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	call.Value()

	sum := p.Touch(mem)
	f.SetReadDeadline(time.Now().Add(uffdtest.Patience))
	for range mem.Pages() {
		m, err := f.ReadMsg()
		if err != nil {
			t.Fatal(err)
		}
		fault, ok := m.Pagefault()
		if !ok {
			t.Fatalf("got %v", &m)
		}
		i := slices.IndexFunc(regions, func(r Region) bool { return r.Range.Contains(fault.Addr) })
		if i < 0 {
			t.Fatalf("%v is outside of %v", fault, regions)
		}
		offset := uint64(regions[i].Offset) + uint64(fault.Addr-regions[i].Range.Start)
		number := byte(offset / uint64(os.Getpagesize()))
		if _, err := f.Copy(fault.Addr, bytes.Repeat([]byte{number + 1}, os.Getpagesize()), 0); err != nil {
			t.Fatal(err)
		}
	}
	if got := sum.Value(); got != 1+2+3+4+5+6+7+8 {
		t.Errorf("the pages add up to %d", got)
	}
}

// TestManyHandOffs looks for leaks.
func TestManyHandOffs(t *testing.T) {
	count := 10_000
	if testing.Short() {
		count = 500
	}
	f := open(t)
	l, path := listen(t)
	good := firecrackerMessages[0].message
	before := 0
	for i := range count {
		dialled, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		a := dialled.(*net.UnixConn)
		fd := fdOf(t, f)
		switch i % 4 {
		case 0, 1:
			if err := SendFirecracker(patient(t), a, f, firecrackerMessages[0].want); err != nil {
				t.Fatal(err)
			}
		case 2:
			sendRaw(t, a, good, fd, fd, fd)
		case 3:
			sendRaw(t, a, good[:20], fd, fd)
			a.Close()
		}
		b, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		got, _, err := ReceiveFirecracker(patient(t), b, 0x6000)
		if (err == nil) != (i%4 != 3) {
			t.Fatalf("hand-off %d: %v", i, err)
		}
		if err == nil {
			same(t, got, f)
			got.Close()
		}
		a.Close()
		b.Close()
		if i == 10 {
			before = openFDs(t)
		}
	}
	if after := openFDs(t); after != before {
		t.Errorf("%d descriptors are open after %d hand-offs, %d were after 11", after, count, before)
	}
}
