package pager_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// sources makes a Source of each kind with the same contents.
func sources(t testing.TB, contents []byte) map[string]source.Source {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(name, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := source.OpenFile(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return map[string]source.Source{
		"bytes":    source.FromBytes(contents),
		"file":     file,
		"readerat": source.FromReaderAt(bytes.NewReader(contents), int64(len(contents))),
		"layers":   source.Layer(source.FromBytes(contents), source.FromReaderAt(bytes.NewReader(contents[:pageSize+7]), int64(pageSize+7))),
	}
}

// Every kind of memory is served from every kind of source, and the last page is
// padded.
func TestServe(t *testing.T) {
	const pages = 3
	for _, kind := range uffdtest.Kinds {
		t.Run(kind.String(), func(t *testing.T) {
			if kind.Huge() {
				uffdtest.LockSettings(t).HugePages(2*pages + 1)
			}
			contents := image(kind, pages)
			for name, s := range sources(t, contents[:len(contents)-100]) {
				t.Run(name, func(t *testing.T) { serveKind(t, kind, s, pages) })
			}
		})
	}
}

func serveKind(t *testing.T, kind uffdtest.Kind, from source.Source, pages int) {
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, kind, pages+1)
	s := serve(t, proc, f, new(pager.Pager), region(mem, from))
	for i := range pages - 1 {
		s.holds(t, mem, i, byte(i+1))
	}
	last := mem.Page(pages - 1)
	padding := last.Skip(int64(last.Len - 100))
	last.Len -= 100
	if n := s.Check(last, byte(pages)).Value(); n != 0 {
		t.Errorf("last page: %d bytes differ", n)
	}
	if n := s.Check(padding, 0).Value(); n != 0 {
		t.Errorf("padding: %d bytes are not zero", n)
	}
	s.holds(t, mem, pages, 0)
	s.noErrors(t)
}

var gigantic = flag.Bool("gigantic", false, "have TestGigantic serve a page of 1 GiB; it takes 2 GiB of memory")

// A page of 1 GiB is one fault.
func TestGigantic(t *testing.T) {
	if !*gigantic {
		return // not asked for
	}
	const size, block = 1 << 30, 16 << 20
	uffdtest.LockSettings(t).HugePagesOf(size, 1)
	contents := make([]byte, size)
	for i := range contents {
		contents[i] = byte(1 + i/block)
	}
	proc := uffdtest.Start(t)
	start := proc.Mmap(0, size, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_HUGETLB|unix.MAP_HUGE_1GB, -1)
	mem := uffd.Range{Start: start, Len: size}
	f := proc.Open(events)
	register(t, f, mem, uffd.RegisterMissing)
	s := serve(t, proc, f, new(pager.Pager), pager.Region{Range: mem, Source: source.FromBytes(contents), PageSize: size})
	begin := time.Now()
	s.Load(start + size - 1).Value()
	t.Logf("the fault took %v", time.Since(begin))
	for i := range size / block {
		if n := s.Check(uffd.Range{Start: start + uffd.Addr(i*block), Len: block}, byte(1+i)).Value(); n != 0 {
			t.Errorf("%d bytes of the block at %#x are not %d", n, i*block, 1+i)
		}
	}
	if err := s.client.Close(); err != nil {
		t.Fatal(err)
	}
	n := s.client.Stats()
	if n.Missing != 1 || n.Copied != 1 {
		t.Errorf("%d faults, %d pages copied; want 1, 1", n.Missing, n.Copied)
	}
	s.noErrors(t)
}

// Exits are noticed in every way there is.
func TestExit(t *testing.T) {
	start := func(t *testing.T) (*served, uffdtest.Memory) {
		proc := uffdtest.Start(t)
		mem, f := mapped(t, proc, uffdtest.Anon, 2)
		s := attach(t, proc, f, new(pager.Pager), region(mem, source.FromBytes(image(uffdtest.Anon, 2))))
		return s, mem
	}
	t.Run("unwatched", func(t *testing.T) {
		s, _ := start(t)
		s.start(t)
		s.Kill()
		if err := s.end(t); err != nil {
			t.Errorf("Serve = %v, want nil", err)
		}
	})
	t.Run("pidfd", func(t *testing.T) {
		s, mem := start(t)
		pidfd, err := pager.OpenPid(s.Pid)
		if err != nil {
			t.Fatal(err)
		}
		defer pidfd.Close()
		s.client.Watch(pidfd)
		s.start(t)
		s.holds(t, mem, 0, 1)
		s.Kill()
		if err := s.end(t); err != nil {
			t.Errorf("Serve = %v, want nil", err)
		}
	})
	t.Run("hang-up", func(t *testing.T) {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
		defer ours.Close()
		s, mem := start(t)
		s.client.Watch(ours)
		s.start(t)
		s.holds(t, mem, 0, 1)
		if _, err := theirs.Write([]byte("not the end")); err != nil {
			t.Fatal(err)
		}
		s.holds(t, mem, 1, 2)
		theirs.Close()
		if err := s.end(t); err != nil {
			t.Errorf("Serve = %v, want nil", err)
		}
	})
}

// Serve ends with its context, and another Serve goes on with what was left.
func TestServeAgain(t *testing.T) {
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 3)
	gate := make(chan struct{})
	s := attach(t, proc, f, &pager.Pager{FaultAround: 1}, region(mem, slow{
		source.FromBytes(image(uffdtest.Anon, 3)), map[int64]chan struct{}{int64(pageSize): gate}}))
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error)
	go func() { result <- s.client.Serve(ctx) }()
	s.holds(t, mem, 0, 1)
	waiting := s.Load(mem.Page(1).Start)
	eventually(t, "the fault is read", func() bool { return s.client.Stats().Reads == 2 })
	cancel()
	if err := <-result; err != context.Canceled {
		t.Fatalf("Serve = %v, want context.Canceled", err)
	}
	close(gate)
	s.start(t)
	if b := waiting.Value(); b != 2 {
		t.Errorf("the fault that was left is served %d, want 2", b)
	}
	s.holds(t, mem, 2, 3)
	if err := s.pager.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.end(t); err != pager.ErrShutdown {
		t.Errorf("Serve = %v, want ErrShutdown", err)
	}
	if err := s.client.Close(); err != nil {
		t.Error(err)
	}
	if err := s.client.Serve(t.Context()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Serve after Close = %v", err)
	}
	if n := s.pager.Stats().Copied; n != 3 {
		t.Errorf("%d pages copied, want 3", n)
	}
}

// A page whose source takes its time delays neither other pages nor other
// clients.
func TestSlowSource(t *testing.T) {
	var p pager.Pager
	p.FaultAround = 1
	gate := make(chan struct{})
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 3)
	contents := source.FromBytes(image(uffdtest.Anon, 3))
	s := serve(t, proc, f, &p, region(mem, slow{contents, map[int64]chan struct{}{0: gate}}))
	other := uffdtest.Start(t)
	otherMem, otherFile := mapped(t, other, uffdtest.Anon, 3)
	o := serve(t, other, otherFile, &p, region(otherMem, slow{contents, nil}))

	waiting := s.Load(mem.Start)
	second := s.Load(mem.Start + 1) // the same page
	eventually(t, "faults are read", func() bool { return s.client.Stats().Missing == 2 })
	s.holds(t, mem, 1, 2)
	o.holds(t, otherMem, 0, 1)
	if waiting.Done() || second.Done() {
		t.Error("the slow page came without its source")
	}
	close(gate)
	if a, b := waiting.Value(), second.Value(); a != 1 || b != 1 {
		t.Errorf("loaded %d and %d, want 1", a, b)
	}
	if n := s.client.Stats().Reads; n != 2 {
		t.Errorf("%d reads, want one for each page", n)
	}
}

func TestAttachRefuses(t *testing.T) {
	proc := uffdtest.Start(t)
	f := proc.Open(nil)
	page := uint64(pageSize)
	zeros := source.Zero(1 << 40)
	for _, test := range []struct {
		name string
		r    []pager.Region
	}{
		{"empty", []pager.Region{{Source: zeros}}},
		{"unaligned start", []pager.Region{{Range: uffd.Range{Start: 1, Len: page}, Source: zeros}}},
		{"unaligned length", []pager.Region{{Range: uffd.Range{Start: 0, Len: page + 1}, Source: zeros}}},
		{"overflow", []pager.Region{{Range: uffd.Range{Start: -uffd.Addr(page), Len: 2 * page}, Source: zeros}}},
		{"no source", []pager.Region{{Range: uffd.Range{Start: 0, Len: page}}}},
		{"negative offset", []pager.Region{{Range: uffd.Range{Start: 0, Len: page}, Source: zeros, Offset: -1}}},
		{"small pages", []pager.Region{{Range: uffd.Range{Start: 0, Len: page}, Source: zeros, PageSize: 512}}},
		{"odd pages", []pager.Region{{Range: uffd.Range{Start: 0, Len: 3 * page}, Source: zeros, PageSize: 3 * pageSize}}},
		{"wrong memory", []pager.Region{{Range: uffd.Range{Start: 0, Len: page}, Source: zeros, Memory: make([]byte, 1)}}},
		{"overlap", []pager.Region{
			{Range: uffd.Range{Start: 0, Len: 4 * page}, Source: zeros},
			{Range: uffd.Range{Start: uffd.Addr(page), Len: page}, Source: zeros},
		}},
	} {
		if _, err := new(pager.Pager).Attach(f, test.r...); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: %v, want EINVAL", test.name, err)
		}
	}
}

// TestRWP has the pager end a protection from accesses, which is not its own.
func TestRWP(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureRWP)
	for _, kind := range uffdtest.Kinds {
		t.Run(kind.String(), func(t *testing.T) {
			if kind.Huge() {
				uffdtest.LockSettings(t).HugePages(16)
			}
			proc := uffdtest.Start(t)
			known, unknown := proc.Map(kind, 4), proc.Map(uffdtest.Shmem, 2)
			f := proc.Open(&uffd.Config{Require: uffd.FeatureRWP})
			for i := range unknown.Pages() {
				proc.Fill(unknown.Page(i), 77).Value()
			}
			register(t, f, known.Range, uffd.RegisterMissing|uffd.RegisterRWP)
			register(t, f, unknown.Range, uffd.RegisterMissing|uffd.RegisterRWP)
			s := serve(t, proc, f, new(pager.Pager), region(known, source.FromBytes(image(kind, 4))))
			for i := range known.Pages() {
				s.holds(t, known, i, byte(i+1))
			}
			for range 2 {
				before := s.client.Stats()
				for _, mem := range []uffdtest.Memory{known, unknown} {
					if err := f.RWProtect(mem.Range, uffd.RWProtectRWP); err != nil {
						t.Fatal(err)
					}
				}
				for i := range known.Pages() {
					s.holds(t, known, i, byte(i+1))
				}
				s.holds(t, unknown, 0, 77)
				if b := proc.Store(unknown.Page(1).Start, 77).Value(); b != 0 {
					t.Errorf("store returned %d", b)
				}
				eventually(t, "the pages are counted", func() bool { return s.client.Stats().Unlocked-before.Unlocked == 6 })
				if n := s.client.Stats(); n.RWProtected-before.RWProtected < 6 || n.Missing != before.Missing || n.Unknown != 0 {
					t.Errorf("%+v, then %+v", before, n)
				}
			}
			s.noErrors(t)
		})
	}
}

// A source that fails for a while, and one that fails for good.
type failing struct {
	source.Source
	fails func(off int64) error
}

func (s failing) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	for o := off; o < off+int64(len(p)); o += int64(pageSize) {
		if err := s.fails(o); err != nil {
			return 0, err
		}
	}
	return s.Source.ReadAt(ctx, p, off)
}

func TestSourceFails(t *testing.T) {
	const pages = 4
	good := source.FromBytes(image(uffdtest.Anon, pages))
	atPage1 := func(err error) func(int64) error {
		return func(off int64) error {
			if off != int64(pageSize) {
				return nil
			}
			return err
		}
	}
	panics := func(off int64) error {
		if off == int64(pageSize) {
			panic("boom")
		}
		return nil
	}
	exits := func(off int64) error { // what t.Fatal does
		if off == int64(pageSize) {
			runtime.Goexit()
		}
		return nil
	}
	check := func(t *testing.T, s *served, mem uffdtest.Memory, action pager.Failure) {
		t.Helper()
		eventually(t, "the failure is reported", func() bool { return len(s.reports()) > 0 })
		var e *pager.PageError
		if err := s.reports()[0]; len(s.reports()) != 1 || !errors.As(err, &e) || e.Page != mem.Page(1) || e.Action != action {
			t.Errorf("reported %v", s.reports())
		}
		for _, i := range []int{0, 2, 3} {
			s.holds(t, mem, i, byte(i+1))
		}
	}
	t.Run("poison", func(t *testing.T) {
		uffdtest.Require(t, uffd.FeaturePoison)
		for name, fails := range map[string]func(int64) error{"error": atPage1(errInjected), "panic": panics, "Goexit": exits} {
			t.Run(name, func(t *testing.T) {
				proc := uffdtest.Start(t)
				mem, f := mapped(t, proc, uffdtest.Anon, pages)
				s := serve(t, proc, f, &pager.Pager{RetryFor: 10 * time.Millisecond, Workers: 1}, region(mem, failing{good, fails}))
				if _, err := s.Load(mem.Page(1).Start).Result(); err != uffdtest.ErrSigbus {
					t.Errorf("the access ended with %v, want a signal", err)
				}
				check(t, s, mem, pager.Poison)
				// Discarded memory is memory again.
				s.Madvise(mem.Page(1), unix.MADV_DONTNEED).Value()
				s.holds(t, mem, 1, 0)
			})
		}
	})
	t.Run("hold", func(t *testing.T) {
		proc := uffdtest.Start(t)
		mem, f := mapped(t, proc, uffdtest.Anon, pages)
		s := serve(t, proc, f, &pager.Pager{RetryFor: -1, OnFailure: pager.Hold}, region(mem, failing{good, atPage1(errInjected)}))
		waits := s.Load(mem.Page(1).Start)
		check(t, s, mem, pager.Hold)
		if waits.Done() {
			t.Error("the access is over")
		}
		// Another client gets the fault anew.
		if err := s.client.Close(); err != nil {
			t.Fatal(err)
		}
		serve(t, proc, f, new(pager.Pager), region(mem, good))
		if b := waits.Value(); b != 2 {
			t.Errorf("the next client serves %d, want 2", b)
		}
	})
	t.Run("zeros", func(t *testing.T) {
		proc := uffdtest.Start(t)
		mem, f := mapped(t, proc, uffdtest.Anon, pages)
		s := serve(t, proc, f, &pager.Pager{RetryFor: -1, OnFailure: pager.Zeros}, region(mem, failing{good, atPage1(errInjected)}))
		s.holds(t, mem, 1, 0)
		check(t, s, mem, pager.Zeros)
	})
	t.Run("retry", func(t *testing.T) {
		proc := uffdtest.Start(t)
		mem, f := mapped(t, proc, uffdtest.Anon, pages)
		left := 3
		s := serve(t, proc, f, &pager.Pager{RetryFor: uffdtest.Patience, FaultAround: 1}, region(mem, failing{good, func(int64) error {
			if left--; left >= 0 {
				return errInjected
			}
			return nil
		}}))
		s.holds(t, mem, 1, 2)
		if n := s.client.Stats(); n.ReadErrors != 3 || n.Reads != 4 {
			t.Errorf("%d reads, %d errors; want 4, 3", n.Reads, n.ReadErrors)
		}
		s.noErrors(t)
	})
	// A mapped file that was truncated is an error, not a crash.
	t.Run("truncated", func(t *testing.T) {
		uffdtest.Require(t, uffd.FeaturePoison)
		name := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(name, image(uffdtest.Anon, pages), 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := source.OpenFile(name)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		proc := uffdtest.Start(t)
		mem, f := mapped(t, proc, uffdtest.Anon, pages)
		s := serve(t, proc, f, &pager.Pager{RetryFor: -1, FaultAround: 1}, region(mem, file))
		if err := os.Truncate(name, int64(2*pageSize)); err != nil {
			t.Fatal(err)
		}
		s.holds(t, mem, 0, 1)
		if _, err := s.Load(mem.Page(3).Start).Result(); err != uffdtest.ErrSigbus {
			t.Errorf("the access ended with %v, want a signal", err)
		}
		s.holds(t, mem, 1, 2)
	})
}

// A function of the pager's owner that ends the goroutine which serves ends Serve,
// and that is no success.
func TestServeGoexit(t *testing.T) {
	for name, test := range map[string]struct {
		mode   uffd.RegisterMode
		change func(*pager.Pager, *pager.Region)
	}{
		"Borrow": {uffd.RegisterMissing, func(_ *pager.Pager, r *pager.Region) {
			r.Source = hooked{source.FromBytes(image(uffdtest.Anon, 1)), func(int) { runtime.Goexit() }}
		}},
		"ErrorHook": {uffd.RegisterMissing, func(p *pager.Pager, r *pager.Region) {
			p.ErrorHook = func(*pager.Client, error) { runtime.Goexit() }
			r.Source = failing{r.Source, func(int64) error { return errInjected }}
		}},
		"BeforeWrite": {uffd.RegisterMissing | uffd.RegisterWP, func(_ *pager.Pager, r *pager.Region) {
			r.BeforeWrite = func(uffd.Range) { runtime.Goexit() }
		}},
	} {
		t.Run(name, func(t *testing.T) {
			if test.mode.Has(uffd.RegisterWP) {
				uffdtest.Require(t, uffd.FeaturePagefaultFlagWP)
			}
			proc := uffdtest.Start(t)
			mem := proc.Map(uffdtest.Anon, 1)
			f := proc.Open(events)
			register(t, f, mem.Range, test.mode)
			contents := source.FromBytes(image(uffdtest.Anon, 1))
			p, r := &pager.Pager{RetryFor: -1}, region(mem, contents)
			test.change(p, &r)
			c, err := p.Attach(f, r)
			if err != nil {
				t.Fatal(err)
			}
			s := &served{client: c}
			s.start(t)
			store := proc.Store(mem.Start, 7)
			if err := s.end(t); err == nil || !strings.Contains(err.Error(), "Goexit") {
				t.Errorf("Serve = %v", err)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			if name == "ErrorHook" { // the page had failed before
				return
			}
			serve(t, proc, f, new(pager.Pager), region(mem, contents)) // nobody is left waiting
			store.Value()
		})
	}
}
