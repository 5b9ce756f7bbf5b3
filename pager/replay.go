package pager

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/go-uffd/uffd"
)

// Replay installs the pages of a record ahead of their faults, which come first
// all the same. It goes through the record in its order, but takes what is near
// in it together, so that sources are read in large pieces. identity is that of
// the memory: a record of other memory, or of regions that differ in number,
// length or page size, is refused with ErrRecordForeign.
//
// What a record says decides about speed, not about contents: only pages that
// were never touched are installed, with what their source has. Memory that has
// moved since Attach is found; what is not there any more is passed over. So are
// pages whose source fails, and the first such error is returned at the end. Else
// it is like Populate.
func (c *Client) Replay(ctx context.Context, r *Record, identity string, progress func(done, total uint64)) error {
	switch {
	case r.identity != identity:
		return fmt.Errorf("%w: it is of %q, this is %q", ErrRecordForeign, r.identity, identity)
	case !slices.Equal(r.shapes, c.shapes()):
		return fmt.Errorf("%w: its regions differ", ErrRecordForeign)
	}
	t := &task{record: r, origin: replay}
	t.total.Store(r.bytes())
	return c.do(ctx, t, func() {
		if progress != nil {
			progress(t.installed.Load(), t.total.Load())
		}
	})
}

// replayBatch is how many runs are taken together.
const replayBatch = 512

// advance gives t the ranges of the next runs. It reports whether there were any.
func (c *Client) advance(t *task) bool {
	n := min(len(t.record.runs)-t.run, replayBatch)
	if n == 0 {
		return false
	}
	runs := slices.Clone(t.record.runs[t.run : t.run+n])
	t.run += n
	slices.SortFunc(runs, func(a, b run) int {
		return cmp.Or(cmp.Compare(a.region, b.region), cmp.Compare(a.first, b.first))
	})
	t.ranges, t.next, t.at = t.ranges[:0], 0, 0
	for len(runs) > 0 {
		joined := runs[0]
		runs = runs[1:]
		for len(runs) > 0 && runs[0].region == joined.region && runs[0].first <= joined.first+joined.n {
			joined.n = max(joined.n, runs[0].first+runs[0].n-joined.first)
			runs = runs[1:]
		}
		t.ranges = c.loop.regions.locate(t.ranges, joined)
	}
	return true
}

// locate appends where the pages of a run are now.
func (rs regions) locate(ranges []uffd.Range, want run) []uffd.Range {
	for _, r := range rs {
		if r.source == nil || r.home != want.region {
			continue
		}
		first, end := max(want.first, r.first), min(want.first+want.n, r.first+r.pages())
		if first < end {
			ranges = append(ranges, r.span(first-r.first, end-first))
		}
	}
	return ranges
}
