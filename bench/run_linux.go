package main

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed c
var sources embed.FS

// imageSize bounds the memory of a client.
const imageSize = 256 << 20

// A bench is what the runs have in common.
type bench struct {
	dir   string   // of the C programs
	image *os.File // what handlers copy: each word is the number of its 4 KiB, from 1 on
	quick bool
}

func newBench(dir string, quick bool) (*bench, error) {
	if err := os.CopyFS(dir, sources); err != nil {
		return nil, err
	}
	b := &bench{dir: filepath.Join(dir, "c"), quick: quick}
	for _, program := range []string{"client", "handler", "tracked", "tracker"} {
		gcc := exec.Command("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", program, program+".c")
		gcc.Dir = b.dir
		if out, err := gcc.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("compiling %s.c needs gcc and the kernel's headers: %w\n%s", program, err, out)
		}
	}
	fd, err := unix.MemfdCreate("image", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	b.image = os.NewFile(uintptr(fd), "image")
	page := make([]uint64, 512)
	for i := range uint64(imageSize / 4096) {
		for w := range page {
			page[w] = i + 1
		}
		if _, err := b.image.Write(asBytes(page)); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// imageName is the image for other processes.
func (b *bench) imageName() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), b.image.Fd()) }

// cpus are those that processes may use; empty means all.
type cpus []int

// start starts a process there.
func (c cpus) start(cmd *exec.Cmd) error {
	if len(c) == 0 {
		return cmd.Start()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var old, set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &old); err != nil {
		return err
	}
	for _, cpu := range c {
		set.Set(cpu)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("processor %v: %w", c, err)
	}
	defer unix.SchedSetaffinity(0, &old)
	return cmd.Start()
}

// A process of a run. What it writes is kept.
type process struct {
	*exec.Cmd
	name        string
	out, errors bytes.Buffer
}

func start(where cpus, socket *os.File, name string, args ...string) (*process, error) {
	p := &process{Cmd: exec.Command(args[0], args[1:]...), name: name}
	p.Stdout, p.Stderr = &p.out, &p.errors
	if socket != nil {
		p.ExtraFiles = []*os.File{socket}
	}
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := where.start(p.Cmd); err != nil {
		return nil, fmt.Errorf("starting the %s: %w", name, err)
	}
	return p, nil
}

func (p *process) kill() {
	p.Process.Kill()
	p.Wait()
}

// runLimit is when a run is taken for hung.
const runLimit = time.Minute

// once runs one turn of a handler.
func (b *bench) once(w *workload, s *server) (sample, error) {
	sockets, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return sample{}, err
	}
	ours, theirs := os.NewFile(uintptr(sockets[0]), "client's"), os.NewFile(uintptr(sockets[1]), "handler's")
	defer ours.Close()
	defer theirs.Close()

	for range s.burners {
		burner, err := start(w.handlerCPUs, nil, "burner", filepath.Join(b.dir, "handler"), "burn=1")
		if err != nil {
			return sample{}, err
		}
		defer burner.kill()
	}
	var h *process
	if s.handler != nil {
		if h, err = start(w.handlerCPUs, theirs, "handler", b.command(s.handler)...); err != nil {
			return sample{}, err
		}
		defer h.kill()
	}
	theirs.Close()
	client := s.client
	if client == nil {
		client = append([]string{"client"}, w.client...)
	}
	c, err := start(w.clientCPUs, ours, "client", b.command(client)...)
	if err != nil {
		return sample{}, err
	}
	ours.Close()
	hung := time.AfterFunc(runLimit, func() { c.Process.Kill() })
	err = c.Wait()
	if !hung.Stop() {
		err = fmt.Errorf("no end after %v", runLimit)
	}
	if h != nil && (s.bulk || s.records || s.tracks) { // it ends by itself
		err = errors.Join(err, h.Wait())
	} else if h != nil {
		h.kill()
	}
	if err != nil {
		err = fmt.Errorf("client: %w %s", err, c.errors.Bytes())
		if h != nil {
			err = fmt.Errorf("%w; handler: %s", err, h.errors.Bytes())
		}
		return sample{}, err
	}
	return result(c, h, s)
}

// result reads what the processes printed.
func result(c, h *process, s *server) (sample, error) {
	var r sample
	var wrong uint64
	_, err := fmt.Sscan(c.out.String(), &r.Count, &r.Nanoseconds, &r.P50, &r.P99, &r.P999, &r.Longest, &wrong)
	if err == nil && s.bulk {
		_, err = fmt.Sscan(h.out.String(), &r.Count, &r.Nanoseconds)
	}
	if err == nil && s.tracks {
		_, err = fmt.Sscan(h.out.String(), &r.Count, &r.Nanoseconds, &r.P50, &r.P99, &r.P999, &r.Longest, &r.Arming)
	}
	switch {
	case err != nil:
		return r, fmt.Errorf("reading the result: %w", err)
	case wrong > 0:
		return r, fmt.Errorf("the client found wrong contents in %d pages", wrong)
	case r.Count == 0 || r.Nanoseconds == 0:
		return r, fmt.Errorf("nothing was measured: %+v", r)
	}
	return r, nil
}

// command completes the command of a process: the first word says which it is.
func (b *bench) command(words []string) []string {
	program := filepath.Join(b.dir, words[0])
	args := append([]string(nil), words[1:]...)
	if words[0] == "go" {
		program = "/proc/self/exe"
	}
	for i, arg := range args {
		args[i] = strings.NewReplacer("IMAGE", b.imageName(), "DIR", b.dir).Replace(arg)
	}
	return append([]string{program}, args...)
}

// measure lets the handlers of a workload take turns.
func (b *bench) measure(ctx context.Context, w *workload) (*results, error) {
	if w.hugePages > 0 {
		restore, err := reserveHugePages(w.hugePages)
		if err != nil {
			return nil, err
		}
		defer restore()
	}
	r := &results{Name: w.name, Samples: make(map[string][]sample)}
	turns := w.turns
	if b.quick {
		turns = 1
	}
	for turn := range turns {
		for i := range w.servers {
			s := &w.servers[(turn+i)%len(w.servers)]
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			got, err := b.once(w, s)
			if err != nil {
				return nil, fmt.Errorf("%s, %s: %w", w.name, s.name, err)
			}
			r.Samples[s.name] = append(r.Samples[s.name], got)
		}
	}
	return r, nil
}

// reserveHugePages makes huge pages, until restore is called.
func reserveHugePages(n int) (restore func(), err error) {
	const path = "/proc/sys/vm/nr_hugepages"
	lock, err := os.Open("/proc/sys/vm/overcommit_memory") // as the tests of the module do
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, err
	}
	old, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, fmt.Append(nil, n), 0)
	}
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("reserving huge pages: %w", err)
	}
	return sync.OnceFunc(func() {
		os.WriteFile(path, bytes.TrimSpace(old), 0)
		lock.Close()
	}), nil
}
