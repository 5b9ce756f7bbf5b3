package source_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-uffd/uffd/source"
)

// sparse is a Source made of a pattern: a letter is a byte of data, 0 a zero
// that is known, and . a hole.
type sparse string

func (s sparse) Size() int64 { return int64(len(s)) }

func (s sparse) kind(off int64) source.Kind {
	switch s[off] {
	case '.':
		return source.Hole
	case '0':
		return source.Zeros
	}
	return source.Data
}

func (s sparse) Run(off int64) (source.Kind, int64) {
	end := off
	for end < s.Size() && s.kind(end) == s.kind(off) {
		end++
	}
	return s.kind(off), end - off
}

func (s sparse) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	for i := range p {
		if s.kind(off+int64(i)) != source.Data {
			return i, errors.New("read what is not data")
		}
		p[i] = s[off+int64(i)]
	}
	return len(p), nil
}

func TestLayers(t *testing.T) {
	for _, test := range []struct {
		name   string
		layers []string
		want   string // - is a zero
		index  string
		runs   int
	}{
		{"base only", []string{"abc"}, "abc", "000", 1},
		{"hole in the base", []string{"a..d"}, "a--d", "0000", 3},
		{"diff on top", []string{"abcdef", "..XY.."}, "abXYef", "001100", 3},
		{"last diff wins", []string{"abcdef", ".XX...", "..YY.."}, "aXYYef", "012200", 4},
		{"zeros hide the base", []string{"abcdef", ".00..."}, "a--def", "011000", 3},
		{"longer diff", []string{"ab", "...Z"}, "ab-Z", "0001", 3},
		{"shorter diff", []string{"abcd", "X"}, "Xbcd", "1000", 2},
		{"runs of one layer join", []string{"abcd", "....", "...."}, "abcd", "0000", 1},
		{"empty", []string{""}, "", "", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			var all []source.Source
			for _, l := range test.layers {
				all = append(all, sparse(l))
			}
			l := source.Layer(all[0], all[1:]...)
			if l.Size() != int64(len(test.want)) {
				t.Fatalf("size %d, want %d", l.Size(), len(test.want))
			}
			want := []byte(strings.ReplaceAll(test.want, "-", "\x00"))
			for off := range want {
				for end := off + 1; end <= len(want)+1; end++ {
					got := bytes.Repeat([]byte{'?'}, end-off)
					if err := source.Read(t.Context(), l, got, int64(off)); err != nil {
						t.Fatal(err)
					}
					wanted := append(bytes.Clone(want), 0)[off:end]
					if !bytes.Equal(got, wanted) {
						t.Errorf("bytes %d to %d: %q, want %q", off, end, got, wanted)
					}
				}
				if got := l.Index(int64(off)); got != int(test.index[off]-'0') {
					t.Errorf("byte %d comes from layer %d, want %c", off, got, test.index[off])
				}
			}
			runs := 0
			for off := int64(0); off < l.Size(); runs++ {
				_, n := source.RunAt(l, off)
				off += n
			}
			if runs != test.runs {
				t.Errorf("%d runs, want %d", runs, test.runs)
			}
			if l.Index(-1) != -1 || l.Index(l.Size()) != -1 {
				t.Error("Index outside of the size is not -1")
			}
		})
	}
}

func TestLayersBorrow(t *testing.T) {
	base := source.FromBytes([]byte("abcdefgh"))
	l := source.Layer(base, sparse("..XX....")) // cannot lend
	for _, test := range []struct {
		off, n int
		want   string
	}{
		{0, 2, "ab"}, {4, 4, "efgh"}, {5, 1, "f"},
		{0, 3, ""}, {2, 1, ""}, {3, 2, ""}, {8, 1, ""}, {7, 2, ""}, {0, 0, ""}, {-1, 1, ""},
	} {
		var got []byte
		err := source.Borrow(l, int64(test.off), test.n, func(p []byte) error {
			got = bytes.Clone(p)
			return nil
		})
		if string(got) != test.want || (err == nil) != (test.want != "") || err != nil && err != source.ErrNotInMemory {
			t.Errorf("Borrow(%d, %d) = %q, %v; want %q", test.off, test.n, got, err, test.want)
		}
	}
	mine := errors.New("mine")
	if err := source.Borrow(l, 0, 1, func([]byte) error { return mine }); err != mine {
		t.Errorf("Borrow returned %v, want what use returned", err)
	}
}

// A bad source fails in the way that it says.
type bad struct {
	n     int
	err   error
	panic any
	kind  source.Kind
	run   int64
}

func (bad) Size() int64 { return 8 }

func (b bad) Run(int64) (source.Kind, int64) {
	if b.panic != nil {
		panic(b.panic)
	}
	return b.kind, b.run
}

func (b bad) ReadAt(context.Context, []byte, int64) (int, error) {
	if b.panic != nil {
		panic(b.panic)
	}
	return b.n, b.err
}

func TestReadErrors(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	mine := errors.New("mine")
	for _, test := range []struct {
		name string
		s    source.Source
		off  int64
		want error
		text string
	}{
		{"error", bad{err: mine}, 0, mine, "reading 4 bytes at 0"},
		{"short with an error", bad{n: 3, err: mine}, 0, mine, ""},
		{"short without an error", bad{n: 3}, 0, io.ErrUnexpectedEOF, ""},
		{"short with EOF", bad{n: 3, err: io.EOF}, 0, io.ErrUnexpectedEOF, ""},
		{"complete with EOF", bad{n: 4, err: io.EOF}, 0, nil, ""},
		{"panic", bad{panic: "boom"}, 0, nil, "boom"},
		{"negative offset", bad{n: 4}, -1, nil, "negative offset -1"},
		{"context", source.FromReaderAt(strings.NewReader("abcd"), 4), 0, context.Canceled, ""},
		{"shorter than its size", source.FromReaderAt(strings.NewReader("abc"), 4), 0, context.Canceled, ""},
		{"layer", source.Layer(bad{kind: source.Hole, run: 8}, bad{err: mine, run: 8}), 0, mine, "layer 1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := source.Read(ctx, test.s, make([]byte, 4), test.off)
			switch {
			case test.want != nil && !errors.Is(err, test.want),
				test.want == nil && test.text == "" && err != nil,
				test.text != "" && (err == nil || !strings.Contains(err.Error(), test.text)):
				t.Errorf("got %v, want %v %s", err, test.want, test.text)
			}
		})
	}
	err := source.Read(t.Context(), source.FromReaderAt(strings.NewReader("abc"), 4), make([]byte, 4), 0)
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a source shorter than its size: %v, want io.ErrUnexpectedEOF", err)
	}
}

func TestReadPads(t *testing.T) {
	for _, s := range []source.Source{
		source.FromBytes([]byte("abc")),
		source.FromReaderAt(strings.NewReader("abc"), 3),
		source.Layer(source.FromBytes([]byte("abc"))),
	} {
		p := []byte("????????")
		if err := source.Read(t.Context(), s, p, 1); err != nil || string(p) != "bc\x00\x00\x00\x00\x00\x00" {
			t.Errorf("%T: %q, %v", s, p, err)
		}
		p = []byte("????")
		if err := source.Read(t.Context(), s, p, 1<<62); err != nil || string(p) != "\x00\x00\x00\x00" {
			t.Errorf("%T, behind the end: %q, %v", s, p, err)
		}
	}
}

func TestRunAt(t *testing.T) {
	const most = 1<<63 - 1
	for _, test := range []struct {
		name string
		s    source.Source
		off  int64
		kind source.Kind
		n    int64
	}{
		{"not sparse", source.FromBytes(make([]byte, 8)), 3, source.Data, 5},
		{"zeros", source.Zero(8), 3, source.Zeros, 5},
		{"at the size", source.Zero(8), 8, source.Hole, most - 8},
		{"far behind the size", source.Zero(8), most, source.Hole, 0},
		{"before the start", source.Zero(8), -1, source.Hole, most},
		{"good run", bad{kind: source.Hole, run: 4}, 0, source.Hole, 4},
		{"run past the end", bad{kind: source.Hole, run: 9}, 0, source.Data, 8},
		{"run of nothing", bad{kind: source.Hole}, 0, source.Data, 8},
		{"unknown kind", bad{kind: 9, run: 4}, 0, source.Data, 8},
		{"panic", bad{panic: "boom"}, 1, source.Data, most - 1},
	} {
		if kind, n := source.RunAt(test.s, test.off); kind != test.kind || n != test.n {
			t.Errorf("%s: %v, %d; want %v, %d", test.name, kind, n, test.kind, test.n)
		}
	}
	if s := source.Kind(7).String(); s != "Kind(7)" {
		t.Errorf("unknown kind prints %q", s)
	}
}

// writeFile makes a file from parts; a part of nil is a hole.
func writeFile(t *testing.T, partSize int, parts ...[]byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i, part := range parts {
		if _, err := f.WriteAt(part, int64(i*partSize)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(int64(len(parts) * partSize)); err != nil {
		t.Fatal(err)
	}
	return name
}

func openFile(t *testing.T, name string) *source.File {
	t.Helper()
	f, err := source.OpenFile(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestFile(t *testing.T) {
	const part = 1 << 20
	a, b := bytes.Repeat([]byte("a"), part), bytes.Repeat([]byte("b"), part)
	f := openFile(t, writeFile(t, part, nil, a, nil, b, nil))
	got := make([]byte, 5*part+10)
	if err := source.Read(t.Context(), f, got, 0); err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, part)
	want := bytes.Join([][]byte{zeros, a, zeros, b, zeros, zeros[:10]}, nil)
	if !bytes.Equal(got, want) {
		t.Error("wrong contents")
	}
	for _, at := range []struct {
		off int64
		n   int
	}{{-1, 1}, {f.Size() - 1, 2}, {f.Size(), 1}, {0, 0}} {
		if err := f.Borrow(at.off, at.n, func([]byte) error { return nil }); err != source.ErrNotInMemory {
			t.Errorf("Borrow of %d bytes at %d: %v, want ErrNotInMemory", at.n, at.off, err)
		}
	}
	for off := int64(0); off < f.Size(); {
		kind, n := source.RunAt(f, off)
		if n <= 0 {
			t.Fatalf("run of %d bytes", n)
		}
		if kind != source.Data && len(bytes.Trim(want[off:off+n], "\x00")) > 0 {
			t.Errorf("a run of %v at %d has data", kind, off)
		}
		off += n
	}
}

func TestFileClose(t *testing.T) {
	f := openFile(t, writeFile(t, 4, []byte("abcd")))
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := source.Read(t.Context(), f, make([]byte, 4), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Read after Close: %v", err)
	}
	if err := source.Borrow(f, 0, 4, func([]byte) error { return nil }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Borrow after Close: %v", err)
	}
	if err := f.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
}

func TestFileRefuses(t *testing.T) {
	if _, err := source.OpenFile(t.TempDir()); err == nil {
		t.Error("opened a directory")
	}
	if _, err := source.OpenFile(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	empty := openFile(t, writeFile(t, 0, nil))
	p := []byte("??")
	if err := source.Read(t.Context(), empty, p, 0); err != nil || string(p) != "\x00\x00" {
		t.Errorf("empty file: %q, %v", p, err)
	}
}

// What is lent outlives Close.
func TestFileCloseWaits(t *testing.T) {
	f := openFile(t, writeFile(t, 4, []byte("abcd")))
	closed := make(chan error)
	err := source.Borrow(f, 0, 4, func(p []byte) error {
		go func() { closed <- f.Close() }()
		select {
		case err := <-closed:
			t.Fatalf("Close returned %v while bytes are lent", err)
		case <-time.After(20 * time.Millisecond):
		}
		if string(p) != "abcd" {
			t.Errorf("lent %q", p)
		}
		return nil
	})
	if err == source.ErrNotInMemory { // not mapped on this system: nothing to wait for
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
}
