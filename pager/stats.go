package pager

import (
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/go-uffd/uffd"
)

// Stats are the numbers of a client or of a pager. They make a value of expvar:
//
//	expvar.Publish("pager", expvar.Func(func() any { return p.Stats() }))
type Stats struct {
	// Faults that were read, by kind.
	Missing, Minor, WriteProtected, RWProtected uint64

	// Pages that were installed, by what they hold.
	Copied, Zeroed, Continued uint64

	// Pages that were installed, by what asked for them: the fault of a
	// thread, fault-around, Populate, Replay.
	Demand, Around, Populated, Replayed uint64

	// Wasted is how many of Around were not touched, by an estimate: now and
	// then fault-around leaves one page out, and if no fault asks for that
	// before four more were left out, the pages count that came since the one
	// before it.
	Wasted uint64

	// Other outcomes.
	Existed   uint64 // pages that were there already
	Woken     uint64 // duplicate faults, ended by waking the thread
	Deferred  uint64 // times the kernel asked to try later
	Dropped   uint64 // faults in memory that is not there any more
	Unknown   uint64 // faults outside of all regions
	Unlocked  uint64 // pages that may be written, or accessed, again
	Poisoned  uint64
	Held      uint64
	Discarded uint64 // pages read from a source in vain, for they changed meanwhile

	// Reads of sources by workers, and those that failed.
	Reads, ReadErrors uint64

	// Events.
	Forks, Remaps, Removes, Unmaps uint64

	// Latency is how long faults took to be resolved, for a fault that waits
	// for a worker until the worker is done. Total counts from the moment the
	// fault was read, with the time that other faults took which were read
	// together with it or were waiting for a worker.
	Latency, Total Histogram
}

// Histogram counts durations: bucket i those below 2^i nanoseconds that are not
// below 2^(i-1).
type Histogram [40]uint64

// Count returns the number of durations.
func (h *Histogram) Count() (n uint64) {
	for _, b := range h {
		n += b
	}
	return n
}

// Quantile returns a duration that a share q of all is not longer than, at most
// twice too long; 0 if there are none.
func (h *Histogram) Quantile(q float64) time.Duration {
	rank := q * float64(h.Count())
	var n uint64
	for i, b := range h {
		n += b
		if n > 0 && float64(n) >= rank {
			return 1 << i
		}
	}
	return 0
}

type counter = atomic.Uint64

type histogram [len(Histogram{})]counter

func (h *histogram) observe(d time.Duration) {
	h[min(bits.Len64(uint64(max(d, 0))), len(h)-1)].Add(1)
}

func (h *histogram) load() (sum Histogram) {
	for i := range h {
		sum[i] = h[i].Load()
	}
	return sum
}

// counters are Stats while they count.
type counters struct {
	missing, minor, writeProtected             counter
	rwProtected                                counter
	copied, zeroed, continued                  counter
	origins                                    [4]counter // by origin
	wasted                                     counter
	existed, woken, deferred, dropped, unknown counter
	unlocked, poisoned, held, discarded        counter
	reads, readErrors                          counter
	forks, remaps, removes, unmaps             counter
	latency, total                             histogram
}

// origin is what asked for a page.
type origin uint8

const (
	demand origin = iota
	faultAround
	populate
	replay
)

// count counts a fault.
func (n *counters) count(flags uffd.PagefaultFlags) {
	switch {
	case flags.Has(uffd.PagefaultWP):
		n.writeProtected.Add(1)
	case flags.Has(uffd.PagefaultRWP):
		n.rwProtected.Add(1)
	case flags.Has(uffd.PagefaultMinor):
		n.minor.Add(1)
	default:
		n.missing.Add(1)
	}
}

func (n *counters) load() Stats {
	return Stats{
		Missing: n.missing.Load(), Minor: n.minor.Load(), WriteProtected: n.writeProtected.Load(),
		RWProtected: n.rwProtected.Load(), Copied: n.copied.Load(), Zeroed: n.zeroed.Load(), Continued: n.continued.Load(),
		Demand: n.origins[demand].Load(), Around: n.origins[faultAround].Load(), Populated: n.origins[populate].Load(),
		Replayed: n.origins[replay].Load(), Wasted: n.wasted.Load(),
		Existed: n.existed.Load(), Woken: n.woken.Load(), Deferred: n.deferred.Load(),
		Dropped: n.dropped.Load(), Unknown: n.unknown.Load(), Unlocked: n.unlocked.Load(),
		Poisoned: n.poisoned.Load(), Held: n.held.Load(), Discarded: n.discarded.Load(),
		Reads: n.reads.Load(), ReadErrors: n.readErrors.Load(),
		Forks: n.forks.Load(), Remaps: n.remaps.Load(), Removes: n.removes.Load(), Unmaps: n.unmaps.Load(),
		Latency: n.latency.load(), Total: n.total.load(),
	}
}

func (s *Stats) add(t *Stats) {
	for _, sum := range []struct{ to, from *uint64 }{
		{&s.Missing, &t.Missing}, {&s.Minor, &t.Minor}, {&s.WriteProtected, &t.WriteProtected},
		{&s.RWProtected, &t.RWProtected},
		{&s.Copied, &t.Copied}, {&s.Zeroed, &t.Zeroed}, {&s.Continued, &t.Continued},
		{&s.Demand, &t.Demand}, {&s.Around, &t.Around}, {&s.Populated, &t.Populated}, {&s.Replayed, &t.Replayed}, {&s.Wasted, &t.Wasted},
		{&s.Existed, &t.Existed}, {&s.Woken, &t.Woken}, {&s.Deferred, &t.Deferred},
		{&s.Dropped, &t.Dropped}, {&s.Unknown, &t.Unknown}, {&s.Unlocked, &t.Unlocked},
		{&s.Poisoned, &t.Poisoned}, {&s.Held, &t.Held}, {&s.Discarded, &t.Discarded},
		{&s.Reads, &t.Reads}, {&s.ReadErrors, &t.ReadErrors},
		{&s.Forks, &t.Forks}, {&s.Remaps, &t.Remaps}, {&s.Removes, &t.Removes}, {&s.Unmaps, &t.Unmaps},
	} {
		*sum.to += *sum.from
	}
	for i := range s.Latency {
		s.Latency[i] += t.Latency[i]
		s.Total[i] += t.Total[i]
	}
}
