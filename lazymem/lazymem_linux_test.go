package lazymem_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/lazymem"
	"github.com/go-uffd/uffd/source"
)

// open returns memory of src, which ends with the test.
func open(t testing.TB, src source.Source, c *lazymem.Config) *lazymem.Memory {
	t.Helper()
	m, err := lazymem.New(src, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// counted returns a source of data that has to be read, and counts that.
func counted(data []byte) *countingSource {
	return &countingSource{Source: source.FromReaderAt(bytes.NewReader(data), int64(len(data)))}
}

// kinds are the kinds of memory.
func kinds(t *testing.T, f func(t *testing.T, c lazymem.Config)) {
	for _, shared := range []bool{false, true} {
		for _, huge := range []bool{false, true} {
			t.Run(fmt.Sprintf("shared=%t,huge=%t", shared, huge), func(t *testing.T) {
				c := lazymem.Config{Shared: shared}
				if huge {
					uffdtest.LockSettings(t).HugePages(8)
					c.PageSize = uffdtest.HugePageSize()
				}
				f(t, c)
			})
		}
	}
}

func TestReadWrite(t *testing.T) {
	kinds(t, func(t *testing.T, c lazymem.Config) {
		data := pattern(5<<20 + 123) // the last page is not full
		for name, src := range map[string]source.Source{"read": counted(data), "borrowed": source.FromBytes(data)} {
			t.Run(name, func(t *testing.T) {
				m := open(t, src, &c)
				got := make([]byte, len(data)+10)
				n, err := m.ReadAt(got[:100], 4000)
				if n != 100 || err != nil || !bytes.Equal(got[:100], data[4000:4100]) {
					t.Errorf("ReadAt = %d, %v", n, err)
				}
				n, err = m.ReadAt(got, 0)
				if n != len(data) || err != io.EOF || !bytes.Equal(got[:n], data) {
					t.Errorf("ReadAt of everything = %d, %v", n, err)
				}
				if n, err := m.ReadAt(got, m.Size()); n != 0 || err != io.EOF {
					t.Errorf("ReadAt behind the end = %d, %v", n, err)
				}
				if n, err := m.ReadAt(got, -1); n != 0 || err == nil {
					t.Errorf("ReadAt before the beginning = %d, %v", n, err)
				}
				m.Close()
				m = open(t, src, &c)
				// A write to a missing page keeps what is around it.
				want := bytes.Clone(data)
				copy(want[len(want)-5:], "abcde")
				n, err = m.WriteAt([]byte("abcdefgh"), m.Size()-5)
				if n != 5 || !errors.Is(err, io.ErrShortWrite) {
					t.Errorf("WriteAt over the end = %d, %v; want 5, ErrShortWrite", n, err)
				}
				if n, err := m.WriteAt([]byte("xyz"), 70000); n != 3 || err != nil {
					t.Errorf("WriteAt = %d, %v", n, err)
				}
				copy(want[70000:], "xyz")
				err = m.Do(func(mem []byte) error {
					if len(mem) != len(want) || cap(mem) != len(want) || !bytes.Equal(mem, want) {
						return errors.New("wrong contents")
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
				if n, err := src.ReadAt(t.Context(), got[:3], 70000); n != 3 || err != nil || bytes.Equal(got[:3], []byte("xyz")) {
					t.Errorf("the source has changed: %q, %v", got[:3], err)
				}
			})
		}
	})
}

func TestConfigErrors(t *testing.T) {
	src := source.Zero(1 << 20)
	for _, c := range []lazymem.Config{{PageSize: 1000}, {PageSize: -4096}, {PageSize: 3 * 4096}, {Window: -1}} {
		if m, err := lazymem.New(src, &c); err == nil {
			m.Close()
			t.Errorf("New with %+v succeeded", c)
		}
	}
	for _, size := range []int64{0, 1<<63 - 1} {
		if m, err := lazymem.New(source.Zero(size), nil); err == nil {
			m.Close()
			t.Errorf("New of %d bytes succeeded", size)
		}
	}
}

// What the kernel refuses is an error by name, and no descriptor is left behind
// then, or by Close.
func TestNewFails(t *testing.T) {
	open(t, source.Zero(1), nil).Close() // what is opened once stays
	before := descriptors(t)
	huge := int64(uffdtest.HugePageSize())
	for _, test := range []struct {
		config lazymem.Config
		size   int64
		want   error
	}{
		{lazymem.Config{PageSize: 2 * pageSize}, 1, unix.EINVAL}, // no kernel has these
		{lazymem.Config{PageSize: 2 * pageSize, Shared: true}, 1, unix.ENODEV},
		{lazymem.Config{PageSize: int(huge)}, huge << 20, unix.ENOMEM},
		{lazymem.Config{PageSize: int(huge), Shared: true}, huge << 20, unix.ENOMEM},
		{lazymem.Config{}, 1, nil},
		{lazymem.Config{Shared: true}, 1, nil},
	} {
		if test.config.PageSize != 0 && huge == 0 || test.size > math.MaxInt {
			continue
		}
		m, err := lazymem.New(source.Zero(test.size), &test.config)
		if err == nil {
			err = m.Close()
		}
		if !errors.Is(err, test.want) {
			t.Errorf("New of %d bytes with %+v: %v, want %v", test.size, test.config, err, test.want)
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
}

// descriptors returns how many the process has open.
func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestDoAs(t *testing.T) {
	m := open(t, counted(pattern(20003)), nil)
	var sum uint32
	err := lazymem.DoAs(m, func(s []uint32) error {
		if len(s) != 5000 || cap(s) != 5000 {
			return fmt.Errorf("len %d, cap %d", len(s), cap(s))
		}
		sum = s[0] + s[4999]
		return nil
	})
	want := uint32(0)
	for _, at := range []int{0, 19996} {
		p := make([]byte, 4)
		m.ReadAt(p, int64(at))
		want += nativeUint32(p)
	}
	if err != nil || sum != want {
		t.Errorf("got %d, %v; want %d", sum, err, want)
	}
}

// A gate stops reads of a source until it is opened.
type gate struct {
	source.Source
	entered chan int64
	open    chan struct{}
}

func newGate(src source.Source) *gate {
	return &gate{src, make(chan int64, 1000), make(chan struct{})}
}

func (g *gate) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	g.entered <- off
	select {
	case <-g.open:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	return g.Source.ReadAt(ctx, p, off)
}

func TestOneReadForMany(t *testing.T) {
	data := pattern(1 << 20)
	count := counted(data)
	g := newGate(count)
	m := open(t, g, nil)
	var group sync.WaitGroup
	var running atomic.Int64
	for i := range 16 {
		group.Go(func() {
			err := m.Do(func(mem []byte) error {
				running.Add(1)
				if mem[i*100] != data[i*100] {
					return errors.New("wrong contents")
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	for running.Load() < 16 { // all have faulted
		time.Sleep(time.Millisecond)
	}
	close(g.open)
	group.Wait()
	if reads, n := count.reads.Load(), count.bytes.Load(); reads != 1 || n != 64<<10 {
		t.Errorf("%d reads of %d bytes, want one of 64 KiB", reads, n)
	}
}

// broken is a source that fails where it is told to.
type broken struct {
	source.Source
	mu  sync.Mutex
	bad func(off, end int64) error
	at  []int64 // what was read
}

func (b *broken) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.at = append(b.at, off)
	if b.bad != nil {
		if err := b.bad(off, off+int64(len(p))); err != nil {
			return 0, err
		}
	}
	return b.Source.ReadAt(ctx, p, off)
}

func (b *broken) set(bad func(off, end int64) error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.bad = bad
}

func badAt(at int64, err error) func(off, end int64) error {
	return func(off, end int64) error {
		if off <= at && at < end {
			return err
		}
		return nil
	}
}

func TestSourceError(t *testing.T) {
	data := pattern(1 << 20)
	failure := errors.New("disk on fire")
	src := &broken{Source: counted(data)}
	at := int64(5 * pageSize)
	src.set(badAt(at, failure))
	m := open(t, src, nil)

	// The neighbours in the window are not affected.
	p := make([]byte, 10)
	if n, err := m.ReadAt(p, at-100); n != 10 || err != nil {
		t.Errorf("ReadAt of a neighbour = %d, %v", n, err)
	}
	want := &lazymem.Error{Off: at, Err: failure}
	for range 2 {
		err := m.Do(func(mem []byte) error {
			p[0] = mem[at+1]
			return nil
		})
		var e *lazymem.Error
		if !errors.As(err, &e) || *e != *want || !errors.Is(err, failure) {
			t.Errorf("Do = %v, want %v", err, want)
		}
	}
	if n, err := m.ReadAt(p, at-5); n != 5 || !errors.Is(err, failure) {
		t.Errorf("ReadAt = %d, %v; want 5, %v", n, err, failure)
	}
	if n, err := m.WriteAt(p, at-5); n != 5 || !errors.Is(err, failure) {
		t.Errorf("WriteAt = %d, %v; want 5, %v", n, err, failure)
	}
	if err := m.Populate(t.Context(), 0, m.Size(), nil); !errors.Is(err, failure) {
		t.Errorf("Populate = %v", err)
	}
	src.set(nil)
	if n, err := m.ReadAt(p, at); n != 10 || err != nil || !bytes.Equal(p, data[at:at+10]) {
		t.Errorf("ReadAt after the repair = %d, %v", n, err)
	}
}

// Those who wait for the page whose read fails get the error too.
func TestSharedError(t *testing.T) {
	failure := errors.New("disk on fire")
	src := &broken{Source: counted(pattern(1 << 20))}
	src.set(badAt(0, failure))
	g := newGate(src)
	m := open(t, g, &lazymem.Config{Window: 1})
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() {
			err := m.Do(func(mem []byte) error {
				sink = mem[0]
				return nil
			})
			if !errors.Is(err, failure) {
				t.Error(err)
			}
		})
	}
	awaitWaiting(t, m, 15)
	close(g.open)
	group.Wait()
	if n := len(src.at); n != 1 {
		t.Errorf("%d reads for 16 goroutines", n)
	}
}

var sink byte

// short is a source that has less than it says.
type short struct {
	source.Source
	lacking int64
}

func (s short) Size() int64 { return s.Source.Size() + s.lacking }

func TestShortSource(t *testing.T) {
	for _, lacking := range []int64{1, 900} {
		m := open(t, short{source.FromReaderAt(bytes.NewReader(pattern(100)), 100), lacking}, nil)
		p := make([]byte, 10)
		if n, err := m.ReadAt(p, 99+lacking-9); n != 0 || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("ReadAt with %d bytes lacking = %d, %v; want 0, ErrUnexpectedEOF", lacking, n, err)
		}
	}
}

// A mapped file that is truncated makes for errors, not zeros or a crash.
func TestTruncatedFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	data := pattern(1 << 20)
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	src, err := source.OpenFile(name)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	m := open(t, src, nil)
	if err := os.Truncate(name, 512<<10); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 10)
	if n, err := m.ReadAt(p, 1000); n != 10 || err != nil || !bytes.Equal(p, data[1000:1010]) {
		t.Errorf("ReadAt of what is left = %d, %v", n, err)
	}
	if n, err := m.ReadAt(p, 600<<10); n != 0 || err == nil {
		t.Errorf("ReadAt of what is gone = %d, %v", n, err)
	}
}

// sparse is a source whose second half is zeros, said in two ways, and must not be
// read.
type sparse struct{ *countingSource }

func (s sparse) Run(off int64) (source.Kind, int64) {
	half, most := s.Size()/2, s.Size()*3/4
	switch {
	case off < half:
		return source.Data, half - off
	case off < most:
		return source.Zeros, most - off
	}
	return source.Hole, s.Size() - off
}

func TestZeros(t *testing.T) {
	kinds(t, func(t *testing.T, c lazymem.Config) {
		data := pattern(8<<20 + 100)
		half := len(data) / 2
		clear(data[half:])
		src := sparse{counted(data)}
		m := open(t, src, &c)
		if err := m.Populate(t.Context(), 0, m.Size(), nil); err != nil {
			t.Fatal(err)
		}
		mem, err := m.Bytes()
		if err != nil || !bytes.Equal(mem, data) {
			t.Errorf("wrong contents, %v", err)
		}
		if n := src.bytes.Load(); c.PageSize == 0 && n > int64(half+4*pageSize) {
			t.Errorf("%d bytes read, more than the data", n)
		}
	})
}

func TestReadAhead(t *testing.T) {
	data := pattern(16 << 20)
	src := counted(data)
	m := open(t, src, nil)
	runs, at := 0, 6<<20
	got := -1
	copy(data[at:], "needle 7!")
	err := m.Do(func(mem []byte) error {
		runs++
		got = bytes.Index(mem, []byte("needle 7!"))
		return nil
	})
	if err != nil || got != at {
		t.Fatalf("found at %d, %v; want %d", got, err, at)
	}
	if runs > 10 {
		t.Errorf("%d runs for %d MiB", runs, at>>20)
	}
	if n := src.bytes.Load(); n > int64(2*at+(64<<10)) {
		t.Errorf("%d bytes read, more than twice what was looked at", n)
	}
	// Jumping around reads a window each.
	src = counted(data)
	m = open(t, src, nil)
	for _, off := range []int{9 << 20, 3 << 20, 12 << 20} {
		err := m.Do(func(mem []byte) error {
			sink = mem[off]
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if n := src.bytes.Load(); n != 3*64<<10 {
		t.Errorf("%d bytes read, want 3 windows", n)
	}
	// Also forwards, in one call.
	src = counted(data)
	m = open(t, src, nil)
	err = m.Do(func(mem []byte) error {
		sink = mem[0] + mem[1<<20] + mem[2<<20] + mem[3<<20]
		return nil
	})
	if n := src.bytes.Load(); err != nil || n != 4*64<<10 {
		t.Errorf("%d bytes read, want 4 windows; %v", n, err)
	}
	// A window can be larger than the memory.
	src = counted(data)
	m = open(t, src, &lazymem.Config{Window: math.MaxInt})
	if _, err := m.ReadAt(make([]byte, 1), m.Size()/2); err != nil || src.reads.Load() != 1 || src.bytes.Load() != m.Size() {
		t.Errorf("%d bytes in %d reads, want all in one; %v", src.bytes.Load(), src.reads.Load(), err)
	}
}

func TestPopulate(t *testing.T) {
	kinds(t, func(t *testing.T, c lazymem.Config) {
		unit := max(1<<20, c.PageSize)
		data := pattern(5*unit + 5)
		m := open(t, counted(data), &c)
		if _, err := m.Bytes(); !errors.Is(err, lazymem.ErrIncomplete) {
			t.Errorf("Bytes = %v, want ErrIncomplete", err)
		}
		off, length := int64(2*unit+77), int64(2*unit)
		var steps []int64
		if err := m.Populate(t.Context(), off, length, func(n int64) { steps = append(steps, n) }); err != nil {
			t.Fatal(err)
		}
		if !slices.IsSorted(steps) || len(steps) < 2 || steps[len(steps)-1] != length {
			t.Errorf("progress %v", steps)
		}
		// System calls work on what was populated, and nowhere else.
		file, err := os.Create(filepath.Join(t.TempDir(), "out"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		err = m.Do(func(mem []byte) error {
			_, err := file.Write(mem[off : off+length])
			return err
		})
		if err != nil {
			t.Errorf("writing populated memory to a file: %v", err)
		}
		err = m.Do(func(mem []byte) error {
			_, err := file.Write(mem[:10])
			return err
		})
		if !errors.Is(err, unix.EFAULT) {
			t.Errorf("writing missing memory to a file: %v, want EFAULT", err)
		}
		if r := m.Resident(); len(r) != 1 || r[0].Off > off || r[0].Off+r[0].Len < off+length {
			t.Errorf("resident: %v", r)
		}
		for _, r := range [][2]int64{{-1, 5}, {0, -1}, {0, m.Size() + 1}, {m.Size() + 1, 0}, {1, 1<<63 - 1}} {
			if err := m.Populate(t.Context(), r[0], r[1], nil); err == nil {
				t.Errorf("Populate(%v) succeeded", r)
			}
			if err := m.Discard(r[0], r[1]); err == nil {
				t.Errorf("Discard(%v) succeeded", r)
			}
		}
		if err := m.Populate(t.Context(), 0, m.Size(), nil); err != nil {
			t.Fatal(err)
		}
		mem, err := m.Bytes()
		if err != nil || !bytes.Equal(mem, data) || cap(mem) != len(data) {
			t.Errorf("Bytes: wrong contents, or %v", err)
		}
		if r := m.Resident(); !slices.Equal(r, []lazymem.Range{{Off: 0, Len: m.Size()}}) {
			t.Errorf("resident: %v", r)
		}
		if err := m.Discard(0, m.Size()); err == nil {
			t.Error("Discard after Bytes succeeded")
		}
	})
}

func TestPopulateCancel(t *testing.T) {
	g := newGate(counted(pattern(4 << 20)))
	m := open(t, g, nil)
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error, 3)
	go func() { errs <- m.Populate(ctx, 0, m.Size(), nil) }()
	<-g.entered
	go func() { errs <- m.Populate(ctx, 0, 1, nil) }() // waits for the other one's read
	p := make([]byte, 1)
	go func() {
		_, err := m.ReadAt(p, 0) // also; and has nothing to do with ctx
		errs <- err
	}()
	time.Sleep(10 * time.Millisecond)
	cancel()
	for range 2 {
		if err := <-errs; !errors.Is(err, context.Canceled) {
			t.Errorf("Populate = %v, want Canceled", err)
		}
	}
	<-g.entered // ReadAt reads for itself
	close(g.open)
	if err := <-errs; err != nil {
		t.Errorf("ReadAt = %v", err)
	}
}

func TestDiscard(t *testing.T) {
	kinds(t, func(t *testing.T, c lazymem.Config) {
		if c.PageSize != 0 && !c.Shared {
			uffdtest.RequireKernel(t, 5, 18, "MADV_DONTNEED of hugetlb memory")
		}
		size := c.PageSize
		if size == 0 {
			size = pageSize
		}
		data := pattern(2*size + size/2)
		m := open(t, counted(data), &c)
		if err := m.Discard(0, m.Size()); err != nil { // nothing is there
			t.Fatal(err)
		}
		if err := m.Populate(t.Context(), 0, m.Size(), nil); err != nil {
			t.Fatal(err)
		}
		for page := range 3 {
			m.WriteAt([]byte("changed"), int64(page*size))
		}
		changed := func() (list string) {
			for page := range 3 {
				p := make([]byte, 7)
				if _, err := m.ReadAt(p, int64(page*size)); err != nil {
					t.Fatal(err)
				}
				switch {
				case string(p) == "changed":
					list += "c"
				case bytes.Equal(p, data[page*size:][:7]):
					list += "-"
				default:
					list += "?"
				}
			}
			return list
		}
		for _, step := range []struct {
			off, end int
			want     string
		}{
			{1, 2*size - 1, "ccc"}, // no whole page
			{1, 2 * size, "c-c"},
			{0, size - 1, "c-c"},
			{2*size - 1, len(data), "c--"}, // the last page is shorter
			{0, size, "---"},
		} {
			if err := m.Discard(int64(step.off), int64(step.end-step.off)); err != nil {
				t.Fatal(err)
			}
			if got := changed(); got != step.want {
				t.Errorf("after Discard of [%d, %d): %s, want %s", step.off, step.end, got, step.want)
			}
		}
		if mem, err := m.Bytes(); err != nil || !bytes.Equal(mem, data) {
			t.Errorf("Bytes: wrong contents, or %v", err)
		}
	})
}

// Where the kernel cannot discard, the contents stay.
func TestDiscardImpossible(t *testing.T) {
	if major, minor := uffdtest.Kernel(); major > 5 || major == 5 && minor >= 18 {
		return
	}
	kinds(t, func(t *testing.T, c lazymem.Config) {
		if c.PageSize == 0 || c.Shared {
			return
		}
		data := pattern(c.PageSize + 5)
		src := counted(data)
		m := open(t, src, &c)
		got := make([]byte, len(data))
		for range 2 {
			if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
				t.Errorf("wrong contents, or %v", err)
			}
			err := m.Discard(0, m.Size())
			if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "Linux 5.18") {
				t.Errorf("Discard = %v", err)
			}
		}
		if reads := src.bytes.Load(); reads != int64(len(data)) {
			t.Errorf("%d bytes read", reads)
		}
	})
}

// Pages that are discarded all the time are still read right.
func TestDiscardRace(t *testing.T) {
	data := pattern(256 << 10)
	m := open(t, counted(data), &lazymem.Config{Window: 8192})
	var stop atomic.Bool
	var discarder, group sync.WaitGroup
	discarder.Go(func() {
		for !stop.Load() {
			if err := m.Discard(0, m.Size()); err != nil {
				t.Error(err)
			}
		}
	})
	for w := range 4 {
		group.Go(func() {
			p := make([]byte, 10_000)
			for i := range 300 {
				off := (i*7919 + w*1000) % (len(data) - len(p))
				if n, err := m.ReadAt(p, int64(off)); n != len(p) || err != nil || !bytes.Equal(p, data[off:off+n]) {
					t.Errorf("ReadAt = %d, %v", n, err)
				}
				same := false
				err := m.Do(func(mem []byte) error {
					same = bytes.Equal(mem[off:off+5000], data[off:off+5000])
					return nil
				})
				if err != nil || !same {
					t.Errorf("Do: %t, %v", same, err)
				}
			}
		})
	}
	group.Wait()
	stop.Store(true)
	discarder.Wait()
}

func TestLost(t *testing.T) {
	m := open(t, counted(pattern(1<<20)), nil)
	err := m.Do(func(mem []byte) error {
		sink = mem[3*pageSize]
		return unix.Madvise(mem[:16*pageSize], unix.MADV_DONTNEED)
	})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1)
	_, err = m.ReadAt(p, int64(3*pageSize))
	var e *lazymem.Error
	if !errors.Is(err, lazymem.ErrLost) || !errors.As(err, &e) || e.Off != int64(3*pageSize) {
		t.Errorf("ReadAt = %v, want ErrLost", err)
	}
	if err := m.Discard(0, m.Size()); err != nil {
		t.Fatal(err)
	}
	if _, err := m.ReadAt(p, int64(3*pageSize)); err != nil {
		t.Errorf("ReadAt after Discard = %v", err)
	}
}

func TestFile(t *testing.T) {
	data := pattern(1<<20 + 1)
	m := open(t, counted(data), &lazymem.Config{Shared: true})
	if _, err := m.File(); !errors.Is(err, lazymem.ErrIncomplete) {
		t.Errorf("File = %v, want ErrIncomplete", err)
	}
	if err := m.Populate(t.Context(), 0, m.Size(), nil); err != nil {
		t.Fatal(err)
	}
	m.WriteAt([]byte("seen by others"), 5000)
	copy(data[5000:], "seen by others")
	f, err := m.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := m.Discard(0, m.Size()); err == nil {
		t.Error("Discard after File succeeded")
	}
	m.Close() // the file stays
	got := make([]byte, len(data))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the file has other contents, %v", err)
	}
	rest := make([]byte, pageSize)
	if n, _ := f.ReadAt(rest, m.Size()); n == 0 || !bytes.Equal(rest, make([]byte, pageSize)) {
		t.Errorf("behind the end are not zeros, or nothing: %d bytes", n)
	}
	for _, size := range []int64{0, 2 << 20} {
		if err := f.Truncate(size); err == nil {
			t.Errorf("the file's size can be made %d", size)
		}
	}
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("the file would go to other programs: %#x, %v", flags, err)
	}
	if _, err := open(t, counted(data), nil).File(); err == nil {
		t.Error("File of private memory succeeded")
	}
}

func TestAllocations(t *testing.T) {
	m := open(t, source.FromBytes(pattern(64<<10)), nil)
	fault := testing.AllocsPerRun(100, func() {
		m.Discard(0, m.Size())
		m.Do(func(mem []byte) error {
			sink = mem[100]
			return nil
		})
	})
	if fault > 1 { // the runtime's panic value
		t.Errorf("%v allocations per fault, want 1", fault)
	}
	p := make([]byte, 100)
	read := testing.AllocsPerRun(100, func() {
		m.Discard(0, m.Size())
		m.ReadAt(p, 100)
	})
	if read > 0 {
		t.Errorf("%v allocations per ReadAt, want none", read)
	}
}

// A forked child must not read zeros: it does not have the memory at all.
func TestNotForked(t *testing.T) {
	m := open(t, counted(pattern(1<<20)), nil)
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	m.Do(func(mem []byte) error {
		_, mine, _ := strings.Cut(string(smaps), fmt.Sprintf("\n%x-", address(mem)))
		_, flags, _ := strings.Cut(mine, "\nVmFlags:")
		flags, _, _ = strings.Cut(flags, "\n")
		if !strings.Contains(flags, " dc") {
			t.Errorf("VmFlags:%s", flags)
		}
		return nil
	})
	runtime.KeepAlive(m)
}

// No other program gets the descriptors.
func TestCloseOnExec(t *testing.T) {
	open(t, source.Zero(1), &lazymem.Config{Shared: true})
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	ours := 0
	for _, entry := range list {
		link, _ := os.Readlink("/proc/self/fd/" + entry.Name())
		if !strings.Contains(link, "memfd:lazymem") && !strings.Contains(link, "[userfaultfd]") {
			continue
		}
		ours++
		fd, err := strconv.Atoi(entry.Name())
		if err != nil {
			t.Fatal(err)
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s: %#x, %v", link, flags, err)
		}
	}
	if ours < 2 {
		t.Errorf("%d descriptors found, want 2", ours)
	}
}

// Memory can be larger than the machine has: most of it may never be touched.
func TestLargerThanTheMachine(t *testing.T) {
	const size = 64 << 30
	if size > math.MaxInt {
		if _, err := lazymem.New(source.Zero(size), nil); err == nil {
			t.Error("New mapped more than there are addresses")
		}
		return
	}
	m, err := lazymem.New(source.Zero(size), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if n, err := m.ReadAt(make([]byte, 100), size/2); n != 100 || err != nil {
		t.Errorf("ReadAt = %d, %v", n, err)
	}
}
