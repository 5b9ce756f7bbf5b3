package lazymem

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/source"
)

// An answer is what the kernel does with one call: it fills so many pages, and
// reports an error or not.
type answer struct {
	pages int
	err   error
}

// The kernel may fill a part of what it is asked for. It does so while other
// threads change the process's mappings, at moments that no test can choose.
func TestPutInParts(t *testing.T) {
	const page, first, pages = 4096, 3, 5
	failed := errors.New("failed")
	var patient, hopeless []answer
	for range 2 {
		for range maxTries {
			patient = append(patient, answer{0, uffd.ErrRetry})
		}
		patient = append(patient, answer{1, uffd.ErrRetry})
	}
	patient = append(patient, answer{3, nil})
	for range maxTries + 1 {
		hopeless = append(hopeless, answer{0, uffd.ErrRetry})
	}
	for _, test := range []struct {
		name    string
		answers []answer
		filled  int
		err     error
		closed  bool
	}{
		{"at once", []answer{{5, nil}}, 5, nil, false},
		{"in parts", []answer{{2, uffd.ErrRetry}, {0, uffd.ErrRetry}, {1, uffd.ErrRetry}, {2, nil}}, 5, nil, false},
		{"fails", []answer{{0, failed}}, 0, failed, false},
		{"fails later", []answer{{3, uffd.ErrRetry}, {0, syscall.EEXIST}}, 3, syscall.EEXIST, false},
		{"fails behind a part", []answer{{3, failed}, {0, failed}}, 3, failed, false},
		{"each part after many tries", patient, 5, nil, false},
		{"never", hopeless, 0, uffd.ErrRetry, false},
		{"after Close", []answer{{2, uffd.ErrRetry}, {0, uffd.ErrRetry}}, 2, uffd.ErrRetry, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := &Memory{base: 1 << 20, pageSize: page, pageShift: 12, pages: 10, missing: 10, present: make([]atomic.Uint64, 1)}
			m.closed.Store(test.closed)
			f := &fill{m: m, at: first * page}
			var asked, want []string
			done, calls := 0, 0
			err := f.put(pages*page, func(to uffd.Addr, d int) (int64, error) {
				if calls == len(test.answers) {
					t.Fatalf("asked %d times", calls+1)
				}
				asked = append(asked, fmt.Sprint(to, d))
				want = append(want, fmt.Sprint(uffd.Addr(1<<20+(first+done)*page), done*page))
				a := test.answers[calls]
				calls++
				done += a.pages
				return int64(a.pages * page), a.err
			})
			if !errors.Is(err, test.err) || err != nil && test.err == nil || calls != len(test.answers) {
				t.Errorf("%v after %d calls, want %v after %d", err, calls, test.err, len(test.answers))
			}
			if !slices.Equal(asked, want) {
				t.Errorf("asked for %v, want %v", asked, want)
			}
			for i := range m.pages {
				if has := i >= first && i < first+test.filled; m.has(i) != has {
					t.Errorf("page %d is there: %t", i, m.has(i))
				}
			}
			if m.missing != m.pages-test.filled || f.at != (first+test.filled)*page {
				t.Errorf("%d pages are missing, the next is at %d", m.missing, f.at)
			}
		})
	}
}

// What is left to do after a part is what follows it, and not more. The kernel
// does a part because there is a page in the way; the page is gone before it is
// asked again.
func TestPutRest(t *testing.T) {
	page := os.Getpagesize()
	data := make([]byte, 8*page)
	for i := range data {
		data[i] = byte(i/page + 1)
	}
	const pages = 3
	for name, test := range map[string]struct {
		put  func(f *fill) error
		want []byte
	}{
		"copy":  {func(f *fill) error { return f.copyIn(data[:pages*page]) }, data[:pages*page]},
		"zeros": {func(f *fill) error { return f.zero(pages * page) }, make([]byte, pages*page)},
	} {
		t.Run(name, func(t *testing.T) {
			m, err := New(source.FromBytes(data), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			inTheWay := m.mem[page : 2*page]
			if _, err := m.file.Copy(uffd.RangeOf(inTheWay).Start, data[:page], uffd.CopyDontWake); err != nil {
				t.Fatal(err)
			}
			m.mu.Lock() // so that put stops behind the first part
			done := make(chan error, 1)
			go func() { done <- test.put(&fill{m: m}) }()
			time.Sleep(20 * time.Millisecond) // too little makes the test easier
			err = unix.Madvise(inTheWay, unix.MADV_DONTNEED)
			m.mu.Unlock()
			if err != nil {
				t.Fatal(err)
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if m.missing != m.pages-pages || m.skipPresent(0, m.pages) != pages {
				t.Errorf("%d pages of %d are missing, the first of them %d", m.missing, m.pages, m.skipPresent(0, m.pages))
			}
			got := make([]byte, len(data))
			if _, err := m.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, append(test.want, data[pages*page:]...)) {
				t.Error("wrong contents")
			}
		})
	}
}

// A page is lost if it is missing twice in a row though it is there, unless it may
// have been discarded in between.
func TestSeenAgain(t *testing.T) {
	page := os.Getpagesize()
	m, err := New(source.FromBytes(make([]byte, 3*page)), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Populate(t.Context(), 0, m.Size(), nil); err != nil {
		t.Fatal(err)
	}
	s := stream{again: -1}
	for i, step := range []struct {
		page    int
		discard bool // before it, of page 2
		want    error
	}{
		{0, false, nil},
		{1, false, nil},
		{0, false, nil},
		{0, true, nil},
		{0, false, ErrLost},
		{2, false, nil}, // it is missing
		{2, false, nil},
	} {
		if step.discard {
			if err := m.Discard(int64(2*page), int64(page)); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.seenAgain(&s, step.page); !errors.Is(err, step.want) {
			t.Errorf("step %d: %v, want %v", i, err, step.want)
		}
	}
}

// A copy that faults and is done in another way has not swallowed anything.
func TestTryCopy(t *testing.T) {
	data := bytes.Repeat([]byte{7}, 3*os.Getpagesize())
	m, err := New(source.FromBytes(data), &Config{Window: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Populate(t.Context(), 0, 1, nil); err != nil {
		t.Fatal(err)
	}
	err = m.Do(func(mem []byte) error {
		b := []byte{0}
		if !tryCopy(b, mem) || b[0] != 7 {
			t.Errorf("what is there: copied %d", b)
		}
		if tryCopy(b, mem[2*os.Getpagesize():]) {
			t.Errorf("what is missing: copied %d", b)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
