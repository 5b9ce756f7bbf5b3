package pager_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// A reader is a Source that cannot lend, and notes what is read.
type reader struct {
	source.Source
	mu    sync.Mutex
	reads [][2]int64 // offset and length
}

func (r *reader) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	r.mu.Lock()
	r.reads = append(r.reads, [2]int64{off, int64(len(p))})
	r.mu.Unlock()
	return r.Source.ReadAt(ctx, p, off)
}

// recorded has a process touch pages, and returns the record.
func recorded(t *testing.T, kinds []uffdtest.Kind, pages int, touch func(s *served, mems []uffdtest.Memory)) *pager.Record {
	t.Helper()
	s, mems := twoRegions(t, kinds, pages, nil)
	s.client.StartRecording("snapshot")
	s.start(t)
	touch(s, mems)
	b, err := s.client.StopRecording().MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	s.noErrors(t)
	var r pager.Record
	if err := r.UnmarshalBinary(b); err != nil {
		t.Fatal(err)
	}
	return &r
}

// twoRegions makes a process with a region of each kind. wrap, if not nil,
// changes their sources.
func twoRegions(t *testing.T, kinds []uffdtest.Kind, pages int, wrap func(source.Source) source.Source) (*served, []uffdtest.Memory) {
	t.Helper()
	proc := uffdtest.Start(t)
	f := proc.Open(events)
	var mems []uffdtest.Memory
	var regions []pager.Region
	for _, kind := range kinds {
		mem := proc.Map(kind, pages)
		register(t, f, mem.Range, uffd.RegisterMissing)
		var contents source.Source = source.FromBytes(image(kind, pages))
		if wrap != nil {
			contents = wrap(contents)
		}
		mems = append(mems, mem)
		regions = append(regions, region(mem, contents))
	}
	return attach(t, proc, f, new(pager.Pager), regions...), mems
}

// What one process touched is installed in another one before that touches it,
// and nothing else; the source is read in large pieces.
func TestReplay(t *testing.T) {
	const pages = 256
	kinds := []uffdtest.Kind{uffdtest.Anon, uffdtest.Shmem}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	order := random.Perm(pages / 2) // the first half, in no order
	record := recorded(t, kinds, pages, func(s *served, mems []uffdtest.Memory) {
		for _, i := range order {
			for _, mem := range mems {
				s.holds(t, mem, i, byte(i+1))
			}
		}
		s.holds(t, mems[1], pages-1, byte(pages%256))
		s.Madvise(mems[0].Page(pages-1), unix.MADV_DONTNEED).Value()
		s.holds(t, mems[0], pages-1, 0) // that is not the source's
	})
	if n := record.Pages(); n != pages+1 || record.Identity() != "snapshot" {
		t.Errorf("%d pages of %q, want %d", n, record.Identity(), pages+1)
	}

	var readers []*reader
	s, mems := twoRegions(t, kinds, pages, func(contents source.Source) source.Source {
		r := &reader{Source: contents}
		readers = append(readers, r)
		return r
	})
	s.start(t)
	// Discarded pages stay so, and pages that moved are found.
	s.Madvise(mems[0].Page(3), unix.MADV_DONTNEED).Value()
	moved := mems[0]
	moved.Start = uffd.Addr(s.Mremap(mems[0].Range, mems[0].Len, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, s.Map(uffdtest.Anon, pages).Start).Value())
	mems[0] = moved

	var last, total uint64
	if err := s.client.Replay(t.Context(), record, "snapshot", func(done, all uint64) { last, total = done, all }); err != nil {
		t.Fatal(err)
	}
	if want := uint64(pages * pageSize); last != want || total != want+uint64(pageSize) {
		t.Errorf("progress %d of %d, want %d of %d", last, total, want, want+uint64(pageSize))
	}
	for k, mem := range mems {
		for i := range pages {
			present := s.Pagemap(mem.Page(i).Start)&uffdtest.PagemapPresent != 0
			want := i < pages/2 && (k != 0 || i != 3) || k == 1 && i == pages-1
			if kinds[k] == uffdtest.Anon && present != want {
				t.Errorf("page %d of region %d present: %v", i, k, present)
			}
		}
	}
	before := s.client.Stats()
	if before.Missing != 0 || before.Replayed != pages {
		t.Errorf("%d faults, %d pages replayed; want 0, %d", before.Missing, before.Replayed, pages)
	}
	for k, mem := range mems {
		for i := range pages / 2 {
			want := byte(i + 1)
			if k == 0 && i == 3 {
				want = 0
			}
			s.holds(t, mem, i, want)
		}
	}
	if n := s.client.Stats().Missing; n != 1 { // the one that was discarded
		t.Errorf("%d faults after Replay, want 1", n)
	}
	for _, r := range readers {
		if n := len(r.reads); n > pages/2/(128<<10/pageSize)+3 { // as a whole, but for the last page and a hole
			t.Errorf("%d reads of a source for %d pages: %v", n, pages/2, r.reads)
		}
	}
	s.noErrors(t)
}

// Faults come before Replay, even if all that Replay may have under way is
// stuck. A page that fails is passed over.
func TestReplayDemandFirst(t *testing.T) {
	const pages = 512
	kinds := []uffdtest.Kind{uffdtest.Anon}
	record := recorded(t, kinds, pages, func(s *served, mems []uffdtest.Memory) { s.Touch(mems[0]).Value() })
	gate := make(chan struct{})
	var broken atomic.Bool
	broken.Store(true)
	s, mems := twoRegions(t, kinds, pages, func(contents source.Source) source.Source {
		return slow{failing{contents, func(off int64) error {
			if broken.Load() && off == int64(100*pageSize) {
				return errInjected
			}
			return nil
		}}, map[int64]chan struct{}{0: gate}}
	})
	s.start(t)
	result := make(chan error)
	go func() { result <- s.client.Replay(t.Context(), record, "snapshot", nil) }()
	eventually(t, "Replay reads", func() bool { return s.client.Stats().Reads > 0 })
	s.holds(t, mems[0], pages-1, byte(pages%256))
	close(gate)
	if err := <-result; !errors.Is(err, errInjected) {
		t.Errorf("Replay = %v, want the source's error", err)
	}
	broken.Store(false)
	if n := s.client.Stats().Replayed; n < pages-128<<10/uint64(pageSize)-16 {
		t.Errorf("%d of %d pages replayed", n, pages)
	}
	for i := range pages {
		s.holds(t, mems[0], i, byte(i+1))
	}
	s.noErrors(t)
}

// A record of other memory does nothing.
func TestReplayForeign(t *testing.T) {
	kinds := []uffdtest.Kind{uffdtest.Anon}
	record := recorded(t, kinds, 4, func(s *served, mems []uffdtest.Memory) { s.Touch(mems[0]).Value() })
	for _, test := range []struct {
		identity string
		kinds    []uffdtest.Kind
		pages    int
	}{{"another", kinds, 4}, {"snapshot", kinds, 5}, {"snapshot", append(slices.Clone(kinds), uffdtest.Shmem), 4}} {
		s, _ := twoRegions(t, test.kinds, test.pages, nil)
		s.start(t)
		if err := s.client.Replay(t.Context(), record, test.identity, nil); !errors.Is(err, pager.ErrRecordForeign) {
			t.Errorf("%v: Replay = %v, want ErrRecordForeign", test, err)
		}
		if n := s.client.Stats().Replayed; n != 0 {
			t.Errorf("%v: %d pages replayed", test, n)
		}
	}
	// The same memory elsewhere is not foreign.
	s, _ := twoRegions(t, kinds, 4, nil)
	s.start(t)
	if err := s.client.Replay(t.Context(), record, "snapshot", nil); err != nil {
		t.Error(err)
	}
}
