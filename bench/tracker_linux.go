package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/track"
)

// A tracker is the Go counterpart of c/tracker.c, and takes snapshots, too.
type tracker struct {
	handler
	part     int  // of the pages is written, in thousandths
	scan     bool // collect with Pagemap.Scan, not with Writes.Collect
	sync     bool
	snapshot bool
}

// trackerMain is the process of a tracker.
func trackerMain(args []string) error {
	t := &tracker{part: 1000, handler: handler{rounds: 1}}
	for _, arg := range args {
		name, value, _ := strings.Cut(arg, "=")
		number, err := strconv.Atoi(value)
		switch name {
		case "part":
			t.part = number
		case "rounds":
			t.rounds = number
		case "scan":
			t.scan = number != 0
		case "sync":
			t.sync = number != 0
		case "snapshot":
			t.snapshot = number != 0
		default:
			err = errors.New("unknown argument")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", arg, err)
		}
	}
	if err := t.receive(); err != nil {
		return err
	}
	if t.snapshot {
		return t.takeSnapshot()
	}
	return t.track()
}

// end has the other process end.
func (t *tracker) end() error {
	_, err := t.conn.Write([]byte("e"))
	return err
}

func (t *tracker) track() error {
	begin := time.Now()
	w, err := track.Start(t.file, t.pid, t.memory)
	if err != nil {
		return err
	}
	armed := time.Since(begin)
	want := track.Async
	if t.sync {
		want = track.Sync
	}
	if w.Method() != want {
		return fmt.Errorf("the method is %v", w.Method())
	}
	if err := t.ready(); err != nil {
		return err
	}
	collect := func() (uint64, error) { return written(w) }
	if t.scan {
		p, err := track.OpenPagemap(t.pid)
		if err != nil {
			return err
		}
		defer p.Close()
		regions := make([]track.Region, 4096)
		collect = func() (uint64, error) { return scan(p, t.memory, regions) }
	}
	var took []time.Duration
	for range t.rounds {
		if _, err := t.conn.Write([]byte("d")); err != nil {
			return err
		}
		if _, err := t.conn.Read(make([]byte, 1)); err != nil {
			return err
		}
		begin := time.Now()
		bytes, err := collect()
		if err != nil {
			return err
		}
		took = append(took, time.Since(begin))
		if pages := bytes / t.page; pages != t.memory.Len/t.page*uint64(t.part)/1000 {
			return fmt.Errorf("%d pages are written", pages)
		}
	}
	if t.rounds == 0 {
		took = append(took, armed)
	}
	slices.Sort(took)
	n := len(took)
	var total time.Duration
	for _, d := range took {
		total += d
	}
	fmt.Println(n, total.Nanoseconds(), took[n/2].Nanoseconds(), took[n*99/100].Nanoseconds(),
		took[n*999/1000].Nanoseconds(), took[n-1].Nanoseconds(), 0)
	return t.end()
}

// written returns how many bytes were written since it was called last.
func written(w *track.Writes) (bytes uint64, err error) {
	for r, err := range w.Collect() {
		if err != nil {
			return 0, err
		}
		bytes += r.Len
	}
	return bytes, nil
}

// scan is written without an iterator: the loop of c/tracker.c.
func scan(p *track.Pagemap, memory uffd.Range, regions []track.Region) (bytes uint64, err error) {
	s := track.Scan{Range: memory, Mask: track.PageWritten, Return: track.PageWritten, Protect: true}
	for s.Range.Len > 0 {
		n, next, err := p.Scan(&s, regions)
		if err != nil {
			return 0, err
		}
		for _, r := range regions[:n] {
			bytes += r.Range().Len
		}
		s.Range = s.Range.Skip(int64(next - s.Range.Start))
	}
	return bytes, nil
}

// takeSnapshot takes one while the other process goes on writing, and prints the
// writes that waited, how long all of it took, how long a write waited on average
// and at most, and how long it took to protect the memory.
func (t *tracker) takeSnapshot() error {
	begin := time.Now()
	s, err := track.StartSnapshot(t.file, t.pid, nil, t.memory)
	if err != nil {
		return err
	}
	n, err := s.WriteTo(io.Discard)
	if err != nil {
		return err
	}
	total := time.Since(begin)
	stats := s.Stats()
	if uint64(n) != t.memory.Len || stats.Stalls == 0 {
		return fmt.Errorf("%d of %d bytes, %+v", n, t.memory.Len, stats)
	}
	mean := (stats.StallTotal / time.Duration(stats.Stalls)).Nanoseconds()
	fmt.Println(stats.Stalls, total.Nanoseconds(), mean, mean, mean, stats.StallMax.Nanoseconds(), stats.Arming.Nanoseconds())
	if err := t.ready(); err != nil {
		return err
	}
	return t.end()
}
