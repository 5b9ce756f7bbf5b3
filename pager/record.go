package pager

import (
	"errors"
	"slices"
	"sync"
)

// A Record says which pages of a client's memory were touched, and in which
// order. It knows them by their place in the client's regions, not by their
// address: it can be replayed for a process whose memory is elsewhere. A Record
// from [Client.StopRecording] does not change any more; several clients can
// replay it at a time.
type Record struct {
	identity string
	shapes   []shape
	runs     []run
}

// A shape is what a record knows of a Region.
type shape struct{ length, pageSize uint64 }

// A run is pages of a region that were touched one after the other.
type run struct {
	region   int
	first, n uint64
}

// Identity returns what [Client.StartRecording] was given.
func (r *Record) Identity() string { return r.identity }

// Pages returns how many pages were touched.
func (r *Record) Pages() (n uint64) {
	for _, run := range r.runs {
		n += run.n
	}
	return n
}

func (r *Record) bytes() (n uint64) {
	for _, run := range r.runs {
		n += run.n * r.shapes[run.region].pageSize
	}
	return n
}

// A recorder makes a record.
type recorder struct {
	identity string

	mu   sync.Mutex
	seen []*pages // by region: present are those that were touched
	runs [][]run  // in pieces, so that it grows without being copied
}

const recorderPiece = 1024

// note takes down a page, the first time it is touched.
func (n *recorder) note(region int, page uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.seen[region].get(page) != absent {
		return
	}
	n.seen[region].set(page, present)
	last := len(n.runs) - 1
	if last >= 0 {
		r := &n.runs[last][len(n.runs[last])-1]
		if r.region == region && r.first+r.n == page {
			r.n++
			return
		}
	}
	if last < 0 || len(n.runs[last]) == recorderPiece {
		n.runs = append(n.runs, make([]run, 0, recorderPiece))
		last++
	}
	n.runs[last] = append(n.runs[last], run{region, page, 1})
}

// StartRecording has the client note which pages its process touches for the
// first time. identity says whose memory it is, the name or the digest of a
// snapshot for example. A recording that is under way is dropped.
//
// Only faults are seen: what Populate or Replay install meanwhile, or was there
// before, is not in the record. For the same reason, a fault brings in one page
// while it is being recorded. Children are not recorded.
func (c *Client) StartRecording(identity string) {
	n := &recorder{identity: identity}
	for _, home := range c.homes {
		n.seen = append(n.seen, newPages(home.Range.Len/uint64(home.PageSize)))
	}
	c.recorder.Store(n)
}

// StopRecording returns what was recorded since StartRecording, or nil if that
// was not called.
func (c *Client) StopRecording() *Record {
	n := c.recorder.Swap(nil)
	if n == nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return &Record{identity: n.identity, shapes: c.shapes(), runs: slices.Concat(n.runs...)}
}

// shapes returns the shapes of the regions as they were attached.
func (c *Client) shapes() (s []shape) {
	for _, home := range c.homes {
		s = append(s, shape{home.Range.Len, uint64(home.PageSize)})
	}
	return s
}

var (
	// ErrRecordCorrupt is a record that is damaged, cut short, or none at all.
	ErrRecordCorrupt = errors.New("pager: the record is damaged")
	// ErrRecordVersion is a record that a later version of this package made.
	ErrRecordVersion = errors.New("pager: the record is of a later version")
	// ErrRecordForeign is a record of other memory.
	ErrRecordForeign = errors.New("pager: the record is of other memory")
)
