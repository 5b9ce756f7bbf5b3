package source

import (
	"context"
	"fmt"
	"io"
	"sort"
)

// Layers is a Source of several others on top of one another: each byte comes
// from the uppermost that does not have a hole there.
type Layers struct {
	layers []Source
	runs   []run // without gaps, from 0 to size
	size   int64
}

// A run is a part of Layers that comes from one layer.
type run struct {
	end   int64
	layer int
	kind  Kind
}

// Layer puts diffs on top of base, the last one uppermost. A diff is mostly
// [Sparse]; one that is not hides everything below its size. The result is as
// long as the longest of them, and has zeros where all have holes.
//
// The runs of all sources are looked up once, here. What does not exist in
// memory in one piece, Layers cannot lend: see [Borrower].
func Layer(base Source, diffs ...Source) *Layers {
	l := &Layers{layers: append([]Source{base}, diffs...)}
	for _, s := range l.layers {
		l.size = max(l.size, s.Size())
	}
	for off := int64(0); off < l.size; {
		r := l.look(off)
		if last := len(l.runs) - 1; last >= 0 && l.runs[last].layer == r.layer && l.runs[last].kind == r.kind {
			l.runs[last].end = r.end
		} else {
			l.runs = append(l.runs, r)
		}
		off = r.end
	}
	return l
}

// look finds the run that begins at off.
func (l *Layers) look(off int64) run {
	end := l.size
	for i := len(l.layers) - 1; i >= 0; i-- {
		kind, n := RunAt(l.layers[i], off)
		end = min(end, off+n)
		if kind != Hole {
			return run{end, i, kind}
		}
	}
	return run{end, 0, Hole}
}

// at returns the run that holds off.
func (l *Layers) at(off int64) run {
	return l.runs[sort.Search(len(l.runs), func(i int) bool { return l.runs[i].end > off })]
}

// Size returns the size of the longest layer.
func (l *Layers) Size() int64 { return l.size }

// Run returns what is at off and how far it goes: see [Sparse]. Two layers are
// never one run.
func (l *Layers) Run(off int64) (Kind, int64) {
	if !within(off, 1, l.size) {
		return Hole, 0
	}
	r := l.at(off)
	return r.kind, r.end - off
}

// Index returns the layer that the byte at off comes from: 0 is the base, also
// where all layers have a hole, 1 the first diff. It is -1 outside of the size.
func (l *Layers) Index(off int64) int {
	if !within(off, 1, l.size) {
		return -1
	}
	return l.at(off).layer
}

// ReadAt reads from every layer that has a part.
func (l *Layers) ReadAt(ctx context.Context, p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("source: negative offset %d", off)
	}
	for n < len(p) {
		if off >= l.size {
			return n, io.EOF
		}
		r := l.at(off)
		part := p[n:]
		part = part[:min(int64(len(part)), r.end-off)]
		if r.kind != Data {
			clear(part)
		} else if k, err := l.layers[r.layer].ReadAt(ctx, part, off); k < len(part) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return n + max(k, 0), fmt.Errorf("layer %d: %w", r.layer, err)
		}
		n += len(part)
		off += int64(len(part))
	}
	return n, nil
}

// Borrow lends bytes that come from one layer, if that can: see [Borrower].
func (l *Layers) Borrow(off int64, n int, use func(p []byte) error) error {
	if !within(off, n, l.size) {
		return ErrNotInMemory
	}
	r := l.at(off)
	if r.kind != Data || !within(off, n, r.end) {
		return ErrNotInMemory
	}
	return Borrow(l.layers[r.layer], off, n, use)
}
