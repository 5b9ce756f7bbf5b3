package uffd_test

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

var (
	stressDuration = flag.Duration("stress.duration", 2*time.Second, "how long TestStress runs")
	stressSeed     = flag.Uint64("stress.seed", 0, "seed of TestStress; 0 for a new one")
)

// A page of the stress test holds, in its lower half, a counter and words that
// follow from it, and in its upper half bytes that never change.

func stressWord(page int, counter uint64, word int) uint64 {
	return (counter+1)*0x9e3779b97f4a7c15 + uint64(page)<<32 + uint64(word)
}

func stressByte(page int) byte { return byte(page*7 + 1) }

func stressWrite(mem []byte, page int, counter uint64) {
	half := len(mem) / 2
	for i := 8; i < half; i += 8 {
		binary.NativeEndian.PutUint64(mem[i:], stressWord(page, counter, i))
	}
	binary.NativeEndian.PutUint64(mem, counter)
}

func stressCheck(mem []byte, page int, counter uint64) error {
	if got := binary.NativeEndian.Uint64(mem); got != counter {
		return fmt.Errorf("page %d has counter %d, want %d", page, got, counter)
	}
	half := len(mem) / 2
	for i := 8; i < half; i += 8 {
		if got := binary.NativeEndian.Uint64(mem[i:]); got != stressWord(page, counter, i) {
			return fmt.Errorf("page %d, counter %d: wrong word at %d", page, counter, i)
		}
	}
	for i := half; i < len(mem); i++ {
		if mem[i] != stressByte(page) {
			return fmt.Errorf("page %d: wrong byte at %d", page, i)
		}
	}
	return nil
}

// stressFaulter is the part of the faulting process.
type stressFaulter struct {
	mem, image []byte // image is nil if the pages stay in their file
	size       int
	advice     int // that discards a page
	pages      []struct {
		sync.Mutex
		counter uint64
	}
	visits, discards atomic.Uint64
}

var _ = uffdtest.Handle("stress", func(args []uint64) ([]uint64, error) {
	size, length := int(args[3]>>32), args[2]
	s := &stressFaulter{mem: uffdtest.BytesAt(args[0], length), size: size, advice: int(uint32(args[3]))}
	if args[1] != 0 {
		s.image = uffdtest.BytesAt(args[1], length)
	}
	s.pages = make([]struct {
		sync.Mutex
		counter uint64
	}, int(length)/size)
	end := time.Now().Add(time.Duration(args[5]))
	workers := max(2, runtime.NumCPU())
	errs := make(chan error, 2*workers)
	for i := range workers {
		go func() { errs <- s.work(rand.New(rand.NewPCG(args[4], uint64(i))), end) }()
		go func() { errs <- s.race(rand.New(rand.NewPCG(args[4], uint64(workers+i))), end) }()
	}
	var err error
	for range 2 * workers {
		err = errors.Join(err, <-errs)
	}
	for i := range s.pages {
		err = errors.Join(err, stressCheck(s.page(i), i, s.pages[i].counter))
	}
	return []uint64{s.visits.Load(), s.discards.Load()}, err
})

func (s *stressFaulter) page(i int) []byte { return s.mem[i*s.size:][:s.size] }

// work checks and changes pages, and discards some of them.
func (s *stressFaulter) work(random *rand.Rand, end time.Time) error {
	for round := 0; round == 0 || time.Now().Before(end); round++ {
		inOrder := random.IntN(2) == 0 // also of the others: they meet
		for i := range len(s.pages) {
			if !inOrder {
				i = random.IntN(len(s.pages))
			}
			if err := s.visit(i, random.IntN(8) == 0); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *stressFaulter) visit(i int, discard bool) error {
	p := &s.pages[i]
	p.Lock()
	defer p.Unlock()
	mem := s.page(i)
	if err := stressCheck(mem, i, p.counter); err != nil {
		return err
	}
	s.visits.Add(1)
	if !discard {
		p.counter++
		stressWrite(mem, i, p.counter)
		return nil
	}
	s.discards.Add(1)
	if s.image != nil {
		copy(s.image[i*s.size:], mem)
	}
	return unix.Madvise(mem, s.advice)
}

// race reads pages whatever the others do with them.
func (s *stressFaulter) race(random *rand.Rand, end time.Time) error {
	for time.Now().Before(end) {
		i := random.IntN(len(s.pages))
		at := s.size/2 + random.IntN(s.size/2)
		if b := s.page(i)[at]; b != stressByte(i) {
			return fmt.Errorf("page %d reads %#x at %d, want %#x", i, b, at, stressByte(i))
		}
		runtime.Gosched()
	}
	return nil
}

// stressHandler is the part of the test process.
type stressHandler struct {
	mem     uffdtest.Memory
	image   []byte
	wp      bool
	contWP  bool
	servers sync.WaitGroup
	child   atomic.Pointer[uffd.File] // of the last forked process

	missing, minor, protected, children atomic.Uint64

	mu   sync.Mutex
	err  error
	stop func()
}

func (h *stressHandler) fail(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err == nil {
		h.stop() // the faulting process would wait for ever
	}
	h.err = errors.Join(h.err, err)
}

func (h *stressHandler) start(f *uffd.File) {
	h.servers.Go(func() {
		if err := h.serve(f); err != nil {
			h.fail(err)
		}
	})
}

// follow closes the descriptor of a child that is gone.
func (h *stressHandler) follow(child *uffd.File) {
	if old := h.child.Swap(child); old != nil {
		old.Close()
	}
}

// serve resolves faults of f until it is closed or its process is gone.
func (h *stressHandler) serve(f *uffd.File) error {
	msgs := make([]uffd.Msg, 8)
	var faults []uffd.Pagefault
	for {
		var deadline time.Time
		if len(faults) > 0 {
			deadline = time.Now().Add(time.Millisecond)
		}
		if err := f.SetReadDeadline(deadline); errors.Is(err, os.ErrClosed) {
			return nil
		}
		n, err := f.ReadMsgs(msgs)
		switch {
		case errors.Is(err, os.ErrClosed):
			return nil
		case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		}
		for i := range msgs[:n] {
			if fault, ok := msgs[i].Pagefault(); ok {
				faults = append(faults, fault)
			}
			if msgs[i].Event() == uffd.EventFork {
				child, err := f.Child(&msgs[i])
				if err != nil {
					return err
				}
				h.children.Add(1)
				h.start(child)
				h.follow(child)
			}
		}
		later := faults[:0]
		for _, fault := range faults {
			switch err := h.resolve(f, fault); {
			case errors.Is(err, uffd.ErrRetry):
				later = append(later, fault)
			case errors.Is(err, uffd.ErrGone):
				return nil
			case err != nil:
				return fmt.Errorf("fault at %v %v: %w", fault.Addr, fault.Flags, err)
			}
		}
		faults = later
	}
}

func (h *stressHandler) resolve(f *uffd.File, fault uffd.Pagefault) error {
	page := h.mem.Page(int(uint64(fault.Addr-h.mem.Start) / uint64(h.mem.Kind.PageSize())))
	if fault.Flags.Has(uffd.PagefaultWP) {
		h.protected.Add(1)
		return f.WriteProtect(page, 0)
	}
	if fault.Flags.Has(uffd.PagefaultMinor) {
		h.minor.Add(1)
	} else {
		h.missing.Add(1)
	}
	err := h.install(f, page)
	if errors.Is(err, unix.EEXIST) {
		err = f.Wake(page)
	}
	return err
}

func (h *stressHandler) install(f *uffd.File, page uffd.Range) error {
	protected := h.wp && rand.IntN(2) == 0
	if h.image == nil {
		var mode uffd.ContinueMode
		if protected && h.contWP {
			mode = uffd.ContinueWP
		}
		_, err := f.Continue(page, mode)
		return err
	}
	var mode uffd.CopyMode
	if protected {
		mode = uffd.CopyWP
	}
	off := uint64(page.Start - h.mem.Start)
	_, err := f.Copy(page.Start, h.image[off:off+page.Len], mode)
	return err
}

// background installs and protects pages that nobody has asked for.
func (h *stressHandler) background(f *uffd.File, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		err := h.install(f, h.mem.Page(rand.IntN(h.mem.Pages())))
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, uffd.ErrRetry) {
			h.fail(err)
			return
		}
		if h.wp {
			err := f.WriteProtect(h.mem.Page(rand.IntN(h.mem.Pages())), uffd.WriteProtectWP)
			if err != nil && !errors.Is(err, uffd.ErrRetry) {
				h.fail(err)
				return
			}
		}
		time.Sleep(200 * time.Microsecond)
	}
}

// TestStress has threads of another process visit pages, each of which knows how
// often, and discard them, while this process installs and protects them, asked
// and unasked, and forked processes read them too.
func TestStress(t *testing.T) {
	seed := *stressSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	duration := *stressDuration
	if testing.Short() {
		duration = min(duration, 300*time.Millisecond)
	}
	t.Logf("-stress.seed=%d", seed)
	t.Run("anon", func(t *testing.T) { stress(t, seed, duration/3, uffdtest.Anon, uffd.RegisterMissing) })
	t.Run("shmem", func(t *testing.T) { stress(t, seed, duration/3, uffdtest.Shmem, uffd.RegisterMissing) })
	t.Run("minor", func(t *testing.T) {
		uffdtest.Require(t, uffd.FeatureMinorShmem)
		stress(t, seed, duration/3, uffdtest.Shmem, uffd.RegisterMinor)
	})
}

func stress(t *testing.T, seed uint64, duration time.Duration, kind uffdtest.Kind, mode uffd.RegisterMode) {
	const pages = 64
	p := uffdtest.Start(t)
	h := &stressHandler{mem: p.Map(kind, pages), stop: sync.OnceFunc(p.Kill)}
	f := p.Open(&uffd.Config{
		Require: uffd.FeatureEventRemove,
		Prefer:  uffd.FeatureEventFork | uffd.FeatureThreadID,
	})
	offered, err := uffd.Probe()
	if err != nil {
		t.Fatal(err)
	}
	h.wp = offered.Has(uffd.FeaturePagefaultFlagWP) && (kind == uffdtest.Anon || offered.Has(uffd.FeatureWPHugetlbfsShmem))
	h.contWP = offered.Has(uffd.FeatureWPUnpopulated) // of the same kernel
	if h.wp {
		mode |= uffd.RegisterWP
	}

	// The contents: in the file behind the memory, or in one that this process
	// copies from.
	discard := unix.MADV_DONTNEED
	source, image := h.mem, uffd.Addr(0)
	if !mode.Has(uffd.RegisterMinor) {
		source = p.Map(uffdtest.Shmem, pages)
		image = source.Start
		if kind.Shared() {
			discard = unix.MADV_REMOVE
		}
	}
	file, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", p.Pid, source.FD), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	contents, err := unix.Mmap(int(file.Fd()), 0, int(source.Len), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	// It stays mapped: should the test give up, handlers may still read it.
	size := kind.PageSize()
	for i := range pages {
		mem := contents[i*size:][:size]
		stressWrite(mem, i, 0)
		for at := size / 2; at < size; at++ {
			mem[at] = stressByte(i)
		}
	}
	if image != 0 {
		h.image = contents
	}

	register(t, f, h.mem.Range, mode)
	h.start(f)
	stop := make(chan struct{})
	var background sync.WaitGroup
	background.Go(func() { h.background(f, stop) })
	began := time.Now()
	call := p.Run("stress", uint64(h.mem.Start), uint64(image), h.mem.Len,
		uint64(size)<<32|uint64(discard), seed, uint64(duration))
	// What a child is given of a shared file could overwrite what has changed
	// since.
	if image == 0 || !kind.Shared() {
		random := rand.New(rand.NewPCG(seed, 1<<32))
		for !call.Done() && f.Features().Has(uffd.FeatureEventFork) {
			var steps []uffdtest.Step
			for range 8 {
				i := random.IntN(pages)
				steps = append(steps, uffdtest.Step{Op: uffdtest.StepCheck, Args: [6]uint64{
					uint64(h.mem.Page(i).Start) + uint64(size/2), uint64(size / 2), uint64(stressByte(i))}})
			}
			v, err := p.Fork(steps...).Result()
			if err != nil {
				h.fail(fmt.Errorf("fork: %w", err))
				break
			}
			for i, bad := range v[1:] {
				if bad != 0 {
					t.Errorf("a child sees %d wrong bytes in step %d: %v", bad, i, steps[i])
				}
			}
			h.follow(nil)
		}
	}
	v, err := call.Result()
	took := time.Since(began)
	close(stop)
	background.Wait()
	h.stop()
	f.Close()
	h.follow(nil)
	h.servers.Wait()
	if err := errors.Join(err, h.err); err != nil {
		t.Fatal(err)
	}
	faults := h.missing.Load() + h.minor.Load() + h.protected.Load()
	t.Logf("%.0f faults/s: %d missing, %d minor, %d protected; %d visits, %d pages discarded, %d forks",
		float64(faults)/took.Seconds(), h.missing.Load(), h.minor.Load(), h.protected.Load(), v[0], v[1], h.children.Load())
	if faults == 0 || v[0] == 0 {
		t.Errorf("%d faults, %d visits", faults, v[0])
	}
}
