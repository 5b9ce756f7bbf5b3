package pager_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// openInProcess opens sources for the processes that the tests start: files,
// and one that cannot be read.
func openInProcess(name string) (source.Source, error) {
	if name == "broken" {
		return broken{}, nil
	}
	if mark, ok := strings.CutPrefix(name, "stuck:"); ok {
		return stuck(mark), nil
	}
	return source.OpenFile(name)
}

// stuck is a source whose reads do not return. It makes a file when one begins.
type stuck string

func (stuck) Size() int64 { return 1 << 30 }
func (s stuck) ReadAt(context.Context, []byte, int64) (int, error) {
	os.WriteFile(string(s), nil, 0o600)
	select {}
}

// broken has a page, which cannot be read.
type broken struct{}

func (broken) Size() int64 { return int64(pageSize) }
func (broken) ReadAt(context.Context, []byte, int64) (int, error) {
	return 0, errInjected
}

// inProcess has ServeProcess serve the memory.
func inProcess(ctx context.Context, p *pager.Pager, f *uffd.File, nice int, mem uffdtest.Memory, source string) chan error {
	result := make(chan error, 1)
	go func() {
		result <- p.ServeProcess(ctx, f, nice, pager.ProcessRegion{Range: mem.Range, Source: source, PageSize: mem.Kind.PageSize()})
	}()
	return result
}

func await(t *testing.T, result chan error) error {
	t.Helper()
	select {
	case err := <-result:
		return err
	case <-time.After(uffdtest.Patience):
		t.Fatal("ServeProcess does not return")
		return nil
	}
}

func imageFile(t *testing.T, pages int) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(name, image(uffdtest.Anon, pages), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// children returns the processes that this one started with ServeProcess.
func children(t *testing.T) (pids []int) {
	t.Helper()
	for _, pid := range allChildren(t) {
		environ, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
		if strings.Contains(string(environ), "UFFD_PAGER_PROCESS=") {
			pids = append(pids, pid)
		}
	}
	return pids
}

// allChildren lists the processes that this one has started, also those that have
// exited and were not waited for.
func allChildren(t *testing.T) (pids []int) {
	t.Helper()
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil || len(lists) == 0 {
		t.Fatalf("no lists of children: %v", err)
	}
	for _, list := range lists {
		content, _ := os.ReadFile(list)
		for _, word := range strings.Fields(string(content)) {
			pid, _ := strconv.Atoi(word)
			pids = append(pids, pid)
		}
	}
	return pids
}

func TestServeProcess(t *testing.T) {
	const pages = 4
	before, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		t.Fatal(err)
	}
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, pages)
	var p pager.Pager
	result := inProcess(t.Context(), &p, f, 7, mem, imageFile(t, pages))
	s := &served{Process: proc}
	for i := range pages {
		s.holds(t, mem, i, byte(i+1))
	}
	pids := children(t)
	if len(pids) != 1 {
		t.Fatalf("there are %d processes, want 1", len(pids))
	}
	tasks, _ := os.ReadDir("/proc/" + strconv.Itoa(pids[0]) + "/task")
	for _, task := range tasks {
		tid, _ := strconv.Atoi(task.Name())
		if nice, err := unix.Getpriority(unix.PRIO_PROCESS, tid); err != nil || 20-nice != 7 {
			t.Errorf("thread %d has the priority %d, %v, want 7", tid, 20-nice, err)
		}
	}
	if nice, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err != nil || nice != before {
		t.Errorf("this thread has the priority %d, %v, and had %d before", 20-nice, err, 20-before)
	}
	proc.Kill()
	if err := await(t, result); err != nil {
		t.Errorf("ServeProcess = %v, want nil when the client is gone", err)
	}
	if n := p.Stats().Copied; n != pages {
		t.Errorf("Copied = %d, want %d", n, pages)
	}
	if pids := children(t); len(pids) != 0 {
		t.Errorf("the processes %v are left", pids)
	}
}

// A process that is stopped, or killed, leaves nobody waiting: the next one goes
// on.
func TestServeProcessAgain(t *testing.T) {
	const pages = 2
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, pages)
	name := imageFile(t, pages)
	s := &served{Process: proc}
	p := &pager.Pager{FaultAround: 1}

	ctx, cancel := context.WithCancel(t.Context())
	result := inProcess(ctx, p, f, 0, mem, name)
	s.holds(t, mem, 0, 1)
	cancel()
	if err := await(t, result); err != context.Canceled {
		t.Errorf("ServeProcess = %v, want %v", err, context.Canceled)
	}

	mark := filepath.Join(t.TempDir(), "mark")
	result = inProcess(t.Context(), p, f, 0, mem, "stuck:"+mark)
	check := proc.Check(mem.Page(1), 2)
	eventually(t, "the fault is read", func() bool {
		_, err := os.Stat(mark)
		return err == nil
	})
	pids := children(t)
	if len(pids) != 1 {
		t.Fatalf("there are %d processes, want 1", len(pids))
	}
	unix.Kill(pids[0], unix.SIGKILL)
	exit, ok := errors.AsType[*exec.ExitError](await(t, result))
	if !ok {
		t.Errorf("ServeProcess = %v, want an ExitError", exit)
	}
	inProcess(t.Context(), p, f, 0, mem, name)
	if n := check.Value(); n != 0 {
		t.Errorf("page 1: %d bytes are wrong", n)
	}
}

func TestServeProcessErrors(t *testing.T) {
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 1)

	err := await(t, inProcess(t.Context(), new(pager.Pager), f, 0, mem, "/no/such/image"))
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), `source "/no/such/image"`) || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a missing source: %v", err)
	}

	mem.Start++
	err = await(t, inProcess(t.Context(), new(pager.Pager), f, 0, mem, imageFile(t, 1)))
	if err == nil || !strings.Contains(err.Error(), "not whole pages") {
		t.Errorf("a bad region: %v", err)
	}
	mem.Start--

	if os.Getuid() != 0 {
		err = await(t, inProcess(t.Context(), new(pager.Pager), f, -1, mem, imageFile(t, 1)))
		if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "CAP_SYS_NICE, or a limit RLIMIT_NICE of 21") {
			t.Errorf("priority -1 without privilege: %v", err)
		}
	}

	var reports []error // of one goroutine
	p := &pager.Pager{RetryFor: -1, OnFailure: pager.Zeros, ErrorHook: func(c *pager.Client, err error) {
		if c != nil {
			t.Errorf("the hook was given the client %p", c)
		}
		reports = append(reports, err)
	}}
	result := inProcess(t.Context(), p, f, 0, mem, "broken")
	(&served{Process: proc}).holds(t, mem, 0, 0)
	proc.Kill()
	if err := await(t, result); err != nil {
		t.Errorf("ServeProcess = %v", err)
	}
	if len(reports) != 1 {
		t.Fatalf("%d reports, want 1: %v", len(reports), reports)
	}
	page, ok := errors.AsType[*pager.PageError](reports[0])
	if !ok || page.Page != mem.Page(0) || page.Action != pager.Zeros || !strings.Contains(page.Err.Error(), errInjected.Error()) {
		t.Errorf("the report is %v", reports[0])
	}
}

// An ErrorHook that ends the goroutine leaves neither a process nor a fault behind.
func TestServeProcessGoexit(t *testing.T) {
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 1)
	p := &pager.Pager{RetryFor: -1, OnFailure: pager.Hold, ErrorHook: func(*pager.Client, error) { runtime.Goexit() }}
	before := len(allChildren(t))
	over := make(chan error, 1)
	go func() {
		defer close(over)
		over <- p.ServeProcess(t.Context(), f, 0, pager.ProcessRegion{Range: mem.Range, Source: "broken"})
	}()
	load := proc.Load(mem.Page(0).Start)
	if err, returned := <-over; returned {
		t.Fatalf("ServeProcess = %v, want no return", err)
	}
	if n := len(allChildren(t)); n != before {
		t.Errorf("%d processes, want %d", n, before)
	}
	inProcess(t.Context(), new(pager.Pager), f, 0, mem, imageFile(t, 1))
	if v := load.Value(); v != 1 {
		t.Errorf("loaded %d, want 1", v)
	}
}
