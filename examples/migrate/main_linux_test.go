package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/go-uffd/uffd/examples/internal/twin"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

func TestMain(m *testing.M) {
	if twin.Second() || len(os.Args) > 1 && os.Args[1] == "-send" { // a process of the program itself
		main()
		os.Exit(0)
	}
	uffdtest.Main(m)
}

// A log is what a program prints. It calls saw after each write.
type log struct {
	mu   sync.Mutex
	text bytes.Buffer
	saw  func(text string)
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	if l.saw != nil {
		l.saw(string(p))
	}
	return len(p), nil
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// patient bounds what must not take long.
func patient(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), uffdtest.Patience)
	t.Cleanup(cancel)
	return ctx
}

func TestDemonstration(t *testing.T) {
	listen(t).Close() // opens what the net package keeps
	before := openFDs(t)
	var out log
	if err := run(patient(t), []string{"-memory", "8", "-steps", "200000"}, &out); err != nil {
		t.Fatalf("%v; it printed:\n%s", err, &out)
	}
	for _, want := range []string{"going on after", "of 8 MiB, ", "with 2048 pages", "the result of a process that stays"} {
		if os.Getpagesize() != 4096 && strings.Contains(want, "2048") {
			continue
		}
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in what it printed:\n%s", want, &out)
		}
	}
	if after := openFDs(t); after > before {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
}

func openFDs(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestSourceIsKilled kills the source when its process has just gone on elsewhere.
func TestSourceIsKilled(t *testing.T) {
	l := listen(t)
	source := exec.Command("/proc/self/exe", "-send", l.Addr().String(), "-steps", "1000000")
	source.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := source.Start(); err != nil {
		t.Fatal(err)
	}
	out := log{saw: func(text string) {
		if strings.Contains(text, "going on after") {
			source.Process.Kill()
			source.Wait()
		}
	}}
	result, err := receive(patient(t), l, 64<<20, &out)
	if err == nil || result != "" || !strings.Contains(err.Error(), "the process was killed") || !strings.Contains(err.Error(), "lost") {
		t.Errorf("got %q, %v; it printed:\n%s", result, err, &out)
	}
}

// TestDestinationThatDoesNotTakeOver has the process go on where it is.
func TestDestinationThatDoesNotTakeOver(t *testing.T) {
	const steps = 10_000
	memory := make([]byte, 1<<20)
	fill(memory)
	stays := newProgram(steps)
	stays.run(memory, steps)
	want := stays.result(memory)

	hangUp := func(conn net.Conn) {}
	for name, meet := range map[string]func(net.Conn){
		"leaves at once":  hangUp,
		"reads the hello": func(conn net.Conn) { readHello(conn, os.Getpagesize(), 1<<20) },
		"is not ready": func(conn net.Conn) {
			readHello(conn, os.Getpagesize(), 1<<20)
			request{kind: read, length: uint32(os.Getpagesize())}.write(conn)
			io.Copy(io.Discard, conn)
		},
		"is something else": func(conn net.Conn) { io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n") },
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t)
			go func() {
				if conn, err := l.Accept(); err == nil {
					meet(conn)
					conn.Close()
				}
			}()
			var out log
			err := send(patient(t), l.Addr().String(), int64(len(memory)), steps, &out)
			if !errors.Is(err, errNotTaken) || !strings.Contains(out.String(), "result "+want) {
				t.Errorf("got %v, want the result %s; it printed:\n%s", err, want, &out)
			}
		})
	}
	t.Run("is not there", func(t *testing.T) {
		l := listen(t)
		l.Close()
		var out log
		err := send(patient(t), l.Addr().String(), int64(len(memory)), steps, &out)
		if !errors.Is(err, errNotTaken) || !strings.Contains(out.String(), "result "+want) {
			t.Errorf("got %v; it printed:\n%s", err, &out)
		}
	})
}

// TestInterrupt ends both sides while a process moves.
func TestInterrupt(t *testing.T) {
	l := listen(t)
	ctx, cancel := context.WithCancel(patient(t))
	out := log{saw: func(text string) {
		if strings.Contains(text, "going on after") {
			cancel()
		}
	}}
	sent := make(chan error, 1)
	go func() { sent <- send(ctx, l.Addr().String(), 32<<20, 1000, io.Discard) }()
	if result, err := receive(ctx, l, 32<<20, &out); err == nil {
		t.Errorf("got the result %q", result)
	}
	if err := <-sent; err == nil || errors.Is(err, errNotTaken) {
		t.Errorf("the source: %v", err)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{"-send", "127.0.0.1:1", "-receive", "127.0.0.1:1"},
		{"-memory", "0"},
		{"-memory", "-1"},
		{"-memory", "9223372036854775807"},
		{"-receive", "nowhere"},
		{"more"},
		{"-unknown"},
	} {
		if err := run(patient(t), args, io.Discard); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestState(t *testing.T) {
	p := newProgram(7)
	p.walkers[2].steps = 9
	q, err := programOf(p.state())
	if err != nil || *q != *p {
		t.Errorf("got %v, %v, want %v", q, err, p)
	}
	for _, bad := range [][]byte{nil, p.state()[1:], append(p.state(), 0)} {
		if q, err := programOf(bad); err == nil {
			t.Errorf("%x gives %v", bad, q)
		}
	}
}
