package pager_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// What shipped servers of faults got wrong, and which tests would notice:
//
//	a refused fill tried in a loop, without reading the event    TestRemoveDuringFill
//	waiting for an event that does not come                      TestArm
//	a fault dropped because the kernel refused to fill it        TestRemoveRace
//	a page that exists taken for success, nobody woken           TestExistingPageWakes, TestHugePoolEmpty
//	a fault filled that is older than the removal of its page    TestRemoveOvertakesFault, TestRemoveOvertakesRead
//	reading of events that waits for a worker                    TestRemoveOvertakesRead, TestSlowSource
//	a page installed first and protected afterwards              TestNoWriteBefore
//	a page that exists left without protection                   TestBeforeWrite
//	threads left waiting for a page that is gone                 TestHeldPageChanges, TestUnmapOvertakesFault
//	a copy from behind the end of the source                     TestServe
//	shared memory mapped that is not ready                       TestMinor
//	shared memory written again that a child has changed         TestForkShared
//	descriptors of children leaked                               TestFork, TestForkFails, TestTorture
//	a server that dies                                           TestTakeOverLosesNoEvent, TestTakeOverServesFaults, TestTakeOverOfMappedPage
//	a mapped source unmapped while it is copied                  TestFileCloseWaits of package source
//	pages installed without waking those who wait                TestNeighboursWake
func TestMain(m *testing.M) {
	pager.ProcessMain(openInProcess)
	uffdtest.Main(m, uffdtest.Role{Name: "pager", Run: servePlan})
}

// events is the configuration of most clients. Some kernels and users have no
// fork events.
var events = &uffd.Config{Prefer: pager.Events}

// A served is a process with its pager.
type served struct {
	*uffdtest.Process
	pager  *pager.Pager
	client *pager.Client
	file   *uffd.File
	result chan error

	mu     sync.Mutex
	errors []error
}

// serve has p serve regions of a process until the test is over.
func serve(t testing.TB, proc *uffdtest.Process, f *uffd.File, p *pager.Pager, rs ...pager.Region) *served {
	t.Helper()
	s := attach(t, proc, f, p, rs...)
	s.start(t)
	return s
}

func attach(t testing.TB, proc *uffdtest.Process, f *uffd.File, p *pager.Pager, rs ...pager.Region) *served {
	t.Helper()
	s := &served{Process: proc, pager: p, file: f}
	p.ErrorHook = func(_ *pager.Client, err error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.errors = append(s.errors, err)
	}
	var err error
	if s.client, err = p.Attach(f, rs...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.client.Close() })
	return s
}

func (s *served) start(t testing.TB) {
	t.Helper()
	s.result = make(chan error, 1)
	go func() { s.result <- s.client.Serve(context.Background()) }()
}

// end waits until Serve returns.
func (s *served) end(t testing.TB) error {
	t.Helper()
	select {
	case err := <-s.result:
		return err
	case <-time.After(uffdtest.Patience):
		t.Fatal("Serve does not return")
		return nil
	}
}

// reports returns what the error hook was told.
func (s *served) reports() []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]error(nil), s.errors...)
}

// eventually waits until ok returns true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	if !elsewhere(t, what, ok) {
		t.FailNow()
	}
}

// elsewhere is eventually for goroutines that a test must not end. It reports
// whether ok was.
func elsewhere(t testing.TB, what string, ok func() bool) bool {
	t.Helper()
	for end := time.Now().Add(uffdtest.Patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("still not: %s", what)
			return false
		}
	}
	return true
}

func register(t testing.TB, f *uffd.File, r uffd.Range, mode uffd.RegisterMode) {
	t.Helper()
	if _, err := f.Register(r, mode); err != nil {
		t.Fatal(err)
	}
}

// mapped maps memory and registers it for missing pages.
func mapped(t testing.TB, p *uffdtest.Process, kind uffdtest.Kind, pages int) (uffdtest.Memory, *uffd.File) {
	t.Helper()
	mem := p.Map(kind, pages)
	f := p.Open(events)
	register(t, f, mem.Range, uffd.RegisterMissing)
	return mem, f
}

// image has pages filled with 1, 2, 3 and so on.
func image(kind uffdtest.Kind, pages int) []byte {
	var b []byte
	for i := range pages {
		b = append(b, bytes.Repeat([]byte{byte(i + 1)}, kind.PageSize())...)
	}
	return b
}

// region is the memory with a source.
func region(mem uffdtest.Memory, s source.Source) pager.Region {
	return pager.Region{Range: mem.Range, Source: s, PageSize: mem.Kind.PageSize()}
}

// holds checks that page i of mem is full of b.
func (s *served) holds(t testing.TB, mem uffdtest.Memory, i int, b byte) {
	t.Helper()
	if n := s.Check(mem.Page(i), b).Value(); n != 0 {
		t.Errorf("page %d: %d bytes are not %d", i, n, b)
	}
}

// slow is a Source that cannot lend, and waits for its gate at some pages.
type slow struct {
	source.Source
	gates map[int64]chan struct{} // by offset of a page
}

func (s slow) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	for at, gate := range s.gates {
		if at >= off && at < off+int64(len(p)) {
			select {
			case <-gate:
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
	}
	return s.Source.ReadAt(ctx, p, off)
}

// noErrors fails the test if the pager reported anything.
func (s *served) noErrors(t testing.TB) {
	t.Helper()
	for _, err := range s.reports() {
		t.Errorf("reported: %v", err)
	}
}

var errInjected = errors.New("injected")

var pageSize = os.Getpagesize()
