//go:build linux

package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/examples/internal/twin"
	"github.com/go-uffd/uffd/pager"
)

// send runs the first quarter of a program, and migrates it.
func send(ctx context.Context, address string, size int64, steps uint64, out io.Writer) error {
	memory, err := mapMemory(size)
	if err != nil {
		return err
	}
	fill(memory)
	p := newProgram(steps)
	p.run(memory, steps/4)
	say := func(format string, args ...any) { fmt.Fprintf(out, "source: "+format+"\n", args...) }
	say("stopped after %d steps", steps/4)

	k := &keeper{hello: hello{pageSize: os.Getpagesize(), memory: size, state: p.state()}, memory: memory}
	k.conn, err = new(net.Dialer).DialContext(ctx, "tcp", address)
	if err == nil {
		stop := context.AfterFunc(ctx, func() { k.conn.Close() })
		err = k.serve()
		stop()
	} else {
		err = fmt.Errorf("%w: %w", errNotTaken, err)
	}
	if errors.Is(err, errNotTaken) && ctx.Err() == nil {
		say("going on here: %v", err)
		p.run(memory, steps)
		say("result %s", p.result(memory))
		return err
	}
	if err != nil {
		return err
	}
	say("all is there, %d MiB were sent; the process stood still for %v", k.sent>>20, k.resumed.Round(10*time.Microsecond))
	return nil
}

// receive takes over the process that comes first, and returns its result.
func receive(ctx context.Context, l net.Listener, limit int64, out io.Writer) (string, error) {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	conn, err := l.Accept()
	l.Close()
	if err != nil {
		return "", err
	}
	a, err := accept(conn, limit)
	if err != nil {
		return "", err
	}
	defer a.close()
	start := time.Now()
	say := func(format string, args ...any) { fmt.Fprintf(out, "destination: "+format+"\n", args...) }

	answer, stdout, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer answer.Close()
	process, err := twin.Start(stdout, hex.EncodeToString(a.hello.state), strconv.FormatInt(a.hello.memory, 10))
	stdout.Close()
	if err != nil {
		return "", err
	}
	defer process.Release()
	defer context.AfterFunc(ctx, func() { process.Process.Kill() })()
	file, memory, err := process.Receive()
	if err != nil {
		return "", err
	}
	defer file.Close()
	pidfd, err := pager.OpenPid(process.Process.Pid)
	if err != nil {
		return "", err
	}
	defer pidfd.Close()
	if err := a.takeOver(ctx, file, memory, pidfd); err != nil {
		return "", err
	}
	if err := process.Continue(); err != nil {
		return "", err
	}
	say("going on after %v, with all memory still there", time.Since(start).Round(10*time.Microsecond))

	var said time.Time
	pages, err := a.complete(ctx, func(_, _ uint64) { // which does not count what is fetched on demand
		if time.Since(said) > 100*time.Millisecond {
			said = time.Now()
			s := a.client.Stats()
			say("%d of %d MiB, %d faults", (s.Copied*uint64(a.hello.pageSize))>>20, a.hello.memory>>20, s.Missing)
		}
	})
	s := a.client.Stats()
	switch {
	case errors.Is(err, errEnded):
		say("the process ended first")
	case err != nil:
		return "", fmt.Errorf("the process was killed, with %d of %d MiB of its memory: %w",
			(s.Copied*uint64(a.hello.pageSize))>>20, a.hello.memory>>20, err)
	default:
		say("independent after %v, with %d pages as the source has them, %d of them on demand; a fault took %v (median), %v (99 %%)",
			time.Since(start).Round(time.Millisecond), pages, s.Demand, s.Total.Quantile(0.5), s.Total.Quantile(0.99))
	}
	text, err := io.ReadAll(io.LimitReader(answer, 1<<10))
	if err := errors.Join(err, process.Wait()); err != nil {
		return "", err
	}
	result := strings.TrimSpace(string(text))
	say("result %s", result)
	return result, nil
}

// goOn is the process at the destination: it has the program's memory, and
// nothing in it.
func goOn(state, size string) error {
	b, err := hex.DecodeString(state)
	if err != nil {
		return err
	}
	n, err := strconv.ParseInt(size, 10, 64)
	if err != nil {
		return err
	}
	p, err := programOf(b)
	if err != nil {
		return err
	}
	memory, err := mapMemory(n)
	if err != nil {
		return err
	}
	f, err := uffd.New(&uffd.Config{Prefer: pager.Events})
	if err != nil {
		return err
	}
	if _, err := f.Register(uffd.RangeOf(memory), uffd.RegisterMissing); err != nil {
		return err
	}
	if err := twin.Send(f, uffd.RangeOf(memory)); err != nil {
		return err
	}
	p.run(memory, p.steps)
	fmt.Println(p.result(memory))
	return nil
}

// demonstrate migrates a process on this machine, and compares what it computes
// with what a process does that stays.
func demonstrate(ctx context.Context, size int64, steps uint64, out io.Writer) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	source := exec.CommandContext(ctx, "/proc/self/exe", "-send", l.Addr().String(),
		"-memory", strconv.FormatInt(size>>20, 10), "-steps", strconv.FormatUint(steps, 10))
	source.Stdout, source.Stderr = out, os.Stderr
	source.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := source.Start(); err != nil {
		l.Close()
		return err
	}
	over := make(chan error, 1)
	go func() {
		over <- source.Wait()
		l.Close() // if it never came
	}()
	got, err := receive(ctx, l, size, out)
	if err != nil {
		source.Process.Kill()
		return errors.Join(err, <-over)
	}
	if err := <-over; err != nil {
		return err
	}
	memory, err := mapMemory(size)
	if err != nil {
		return err
	}
	fill(memory)
	p := newProgram(steps)
	p.run(memory, steps)
	if want := p.result(memory); got != want {
		return fmt.Errorf("a process that stays has the result %s", want)
	}
	fmt.Fprintln(out, "that is the result of a process that stays")
	return nil
}
