package track

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-uffd/uffd"
)

// SnapshotFeatures are what a userfaultfd needs for a [Snapshot]
// (Linux 6.4). [uffd.FeatureEventFork] is needed too for memory that forked
// children share.
const SnapshotFeatures = uffd.FeaturePagefaultFlagWP | uffd.FeatureWPUnpopulated |
	uffd.FeatureEventRemove | uffd.FeatureEventRemap | uffd.FeatureEventUnmap

// ErrSnapshotLost means that memory was discarded, unmapped, moved or shared with
// a forked child before it was copied, or lost its protection. A snapshot of
// that moment cannot be had any more; another one can be started.
var ErrSnapshotLost = errors.New("the snapshot is lost")

// DefaultAhead is the Ahead of the zero SnapshotConfig: 64 MiB.
const DefaultAhead = 64 << 20

// SnapshotConfig says how a [Snapshot] goes about its work.
type SnapshotConfig struct {
	// Ahead is how many bytes may be kept in memory of pages that were written
	// before their turn came; 0 means DefaultAhead. When there is no room, who
	// writes waits until WriteTo comes to the page.
	Ahead int
}

// SnapshotStats are the numbers of a [Snapshot].
type SnapshotStats struct {
	Size   uint64        // bytes of the snapshot
	Arming time.Duration // to protect the memory; who writes meanwhile waits until the end of it

	// Writes that waited for their page to be copied. How long they did is
	// counted from when the Snapshot last looked for faults, so it is rather
	// too much than too little; those that came during the arming count from
	// its end.
	Stalls     uint64
	StallMax   time.Duration
	StallTotal time.Duration

	AheadMax uint64 // bytes kept at a time of pages that were written before their turn
}

// A Snapshot is a copy of a process's memory as it was at one moment, made while
// the process goes on. It write-protects the memory, and copies each page
// before it is written for the first time; all others when their turn comes.
//
// What is copied is what the process has at its addresses. As with [Writes], some
// changes do not go through them and so end up in the snapshot although they
// came later: those through another mapping of the same file, by write(2),
// ftruncate(2) or fallocate(2) on it, and by a device or a system call that had
// the page pinned when the snapshot was started. Pages of a file, or of shared
// memory, that do not exist yet come to exist when they are copied.
//
// A page that is discarded (MADV_DONTNEED, MADV_FREE, MADV_REMOVE), unmapped or
// moved once it is copied is no matter. One that is not makes the snapshot fail
// with [ErrSnapshotLost], and so does a fork when memory is shared with the
// child. Each page is seen to be protected still after it was copied: what lost
// its protection in any other way, as by KSM or MADV_GUARD_INSTALL, is
// ErrSnapshotLost, too. Whatever happens, the process goes on.
//
// All methods are safe for concurrent use.
type Snapshot struct {
	file    *uffd.File
	pid     int
	pagemap *Pagemap
	ranges  []uffd.Range // sorted
	size    uint64

	writing atomic.Bool
	free    chan []byte // to be filled
	full    chan []byte // to be written; closed when the copying has ended
	over    chan struct{}

	copier copier // of the goroutine that serves the userfaultfd

	mu    sync.Mutex
	abort error // why to end early
	err   error // why the copying has ended; nil if all is copied
	stats SnapshotStats

	stop    sync.Once
	stopErr error
}

const (
	snapshotChunk   = 256 << 10 // bytes copied at a time: faults wait that long
	snapshotBuffers = 2
)

// OpenSnapshot opens a userfaultfd for the calling process that suits
// [StartSnapshot]: with SnapshotFeatures, and FeatureEventFork where that is
// permitted.
//
// Errors: *[uffd.OpenError]; *[uffd.FeatureError] before Linux 6.4, or without
// write protection.
func OpenSnapshot() (*uffd.File, error) {
	return uffd.New(&uffd.Config{Require: SnapshotFeatures, Prefer: uffd.FeatureEventFork})
}

// StartSnapshot starts a snapshot of ranges of the memory of process pid, which
// has opened f, with [OpenSnapshot] or its features. The snapshot is of the
// moment when StartSnapshot returns: what a thread has written until then is in
// it, and nothing later. f must serve nothing else; it belongs to the Snapshot
// from then on, unless StartSnapshot fails. The process should close its own
// descriptor once it has sent it here. A nil config is the zero one.
//
// A process cannot take a snapshot of itself: a goroutine that waits for another
// one to answer its fault can hang the whole process (see package uffd). Fork
// or start a process that does.
//
// The caller must be permitted to read the process's memory (see
// PTRACE_MODE_ATTACH in ptrace(2)), and the memory must be readable. A
// userfaultfd that traps only user faults makes the process's system calls fail
// with EFAULT that write to pages not copied yet.
//
// Errors: [errors.ErrUnsupported] in the calling process; EINVAL if the ranges are
// not whole pages, overlap, or are not mapped throughout, if f lacks features,
// has others that nobody would serve, or belongs to another process;
// ErrSnapshotLost if the process unmapped or discarded memory just then;
// [os.ErrPermission]; those of [OpenPagemap], and of Register and WriteProtect
// of [uffd.File].
func StartSnapshot(f *uffd.File, pid int, config *SnapshotConfig, ranges ...uffd.Range) (*Snapshot, error) {
	s, err := startSnapshot(f, pid, config, ranges)
	if err != nil {
		return nil, fmt.Errorf("track: starting a snapshot: %w", err)
	}
	return s, nil
}

func startSnapshot(f *uffd.File, pid int, config *SnapshotConfig, ranges []uffd.Range) (*Snapshot, error) {
	s, err := armedSnapshot(f, pid, config, ranges)
	if err == nil {
		go s.run()
	}
	return s, err
}

// armedSnapshot returns a Snapshot whose memory is protected and that nobody
// serves yet.
func armedSnapshot(f *uffd.File, pid int, config *SnapshotConfig, ranges []uffd.Range) (*Snapshot, error) {
	if pid == 0 || pid == os.Getpid() {
		return nil, fmt.Errorf("a process cannot serve its own faults: %w", errors.ErrUnsupported)
	}
	features := f.Features()
	if missing := SnapshotFeatures &^ features; missing != 0 {
		return nil, invalid(fmt.Sprintf("the userfaultfd lacks %v; open it with track.OpenSnapshot", missing))
	}
	if bad := features & (uffd.FeatureWPAsync | uffd.FeatureSigbus); bad != 0 {
		return nil, invalid(fmt.Sprintf("the userfaultfd has %v, with which no write waits; open it with track.OpenSnapshot", bad))
	}
	ahead := DefaultAhead
	if config != nil && config.Ahead != 0 {
		ahead = config.Ahead
	}
	if len(ranges) == 0 {
		return nil, invalid("there is no memory to copy")
	}
	if ahead < 0 {
		return nil, invalid(fmt.Sprintf("Ahead is %d", ahead))
	}
	sorted, err := sortRanges(ranges)
	if err != nil {
		return nil, err
	}
	areas, err := readAreas(pid, sorted)
	if err != nil {
		return nil, err
	}
	var size, mapped uint64
	for _, r := range sorted {
		size += r.Len
	}
	for _, a := range areas {
		mapped += a.Len
		if a.inherited && !features.Has(uffd.FeatureEventFork) {
			return nil, invalid(fmt.Sprintf("forked children would share %v and write to it unseen: "+
				"the userfaultfd needs %v, or the memory MADV_DONTFORK", a.Range, uffd.FeatureEventFork))
		}
	}
	if mapped != size {
		return nil, invalid(fmt.Sprintf("%d of %d bytes are not mapped", size-mapped, size))
	}
	pagemap, err := OpenPagemap(pid)
	if err != nil {
		return nil, err
	}
	s := &Snapshot{
		file:    f,
		pid:     pid,
		pagemap: pagemap,
		ranges:  sorted,
		size:    size,
		free:    make(chan []byte, snapshotBuffers),
		full:    make(chan []byte, snapshotBuffers),
		over:    make(chan struct{}),
		copier:  newCopier(areas, uint64(ahead)),
	}
	s.stats.Size = size
	if err := s.arm(); err != nil {
		release(f, sorted)
		s.receive(time.Now().Add(retryDelay)) // who waits for its event to be read
		f.SetReadDeadline(time.Time{})
		pagemap.Close()
		return nil, err
	}
	return s, nil
}

// WriteTo writes the snapshot to w: the bytes of the ranges, in the order of
// their addresses. It can be called once, at any time after StartSnapshot; the
// sooner, the less has to be kept in memory. When it returns, nothing is
// protected any more.
//
// n bytes were written; unless err is nil they are not all of the snapshot.
//
// Errors: [ErrSnapshotLost]; [uffd.ErrGone] if the process has exited, or called
// execve(2); [os.ErrClosed] after Stop; those of w.
func (s *Snapshot) WriteTo(w io.Writer) (n int64, err error) {
	if s.writing.Swap(true) {
		return 0, fmt.Errorf("track: %w", invalid("WriteTo was called before"))
	}
	for range snapshotBuffers {
		s.give(make([]byte, snapshotChunk))
	}
	for chunk := range s.full {
		k, err := w.Write(chunk)
		n += int64(k)
		if err == nil && k < len(chunk) {
			err = io.ErrShortWrite
		}
		if err != nil {
			s.end(err)
			return n, err
		}
		s.give(chunk[:cap(chunk)])
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return n, fmt.Errorf("track: snapshot of process %d: %w", s.pid, s.err)
	}
	return n, nil
}

// give has the copier fill a buffer.
func (s *Snapshot) give(buf []byte) {
	s.free <- buf
	s.poke()
}

// poke makes the copier look up from its waiting.
func (s *Snapshot) poke() { s.file.SetReadDeadline(time.Unix(1, 0)) }

// end has the copying end early.
func (s *Snapshot) end(why error) {
	s.mu.Lock()
	if s.abort == nil {
		s.abort = why
	}
	s.mu.Unlock()
	s.poke()
}

func (s *Snapshot) aborted() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.abort
}

// Stats returns the numbers so far.
func (s *Snapshot) Stats() SnapshotStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}

// Stop lifts the protection, if WriteTo has not come to the end, and closes the
// userfaultfd. The process goes on. It ends a WriteTo that is under way.
func (s *Snapshot) Stop() error {
	s.stop.Do(func() {
		s.end(os.ErrClosed)
		for range s.full { // what WriteTo leaves
		}
		s.stopErr = s.file.Close()
		<-s.over
		s.pagemap.Close()
	})
	return s.stopErr
}
