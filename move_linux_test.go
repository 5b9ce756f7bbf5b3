package uffd_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// moveChunk has chunk r of dst, which is missing, be filled from src.
func moveChunk(t *testing.T, p *uffdtest.Process, f *uffd.File, dst, src uffd.Range, want byte) {
	t.Helper()
	if bad := p.Check(src, want).Value(); bad != 0 {
		t.Fatalf("source %v: %d bytes are wrong before the move", src, bad)
	}
	check := p.Check(dst, want)
	nextFault(t, f, dst, 0)
	n, err := p.Move(dst.Start, src, 0).Result()
	if uffdtest.UncountedMove.Here() && len(n) == 1 && (err == unix.EEXIST || err == unix.EAGAIN && n[0] > 0) {
		n[0], err = moveRest(t, p, f, dst, src, n[0])
	}
	if err != nil || n[0] != src.Len {
		t.Fatalf("Move = %d, %v; want %d", n, err, src.Len)
	}
	if bad := check.Value(); bad != 0 {
		t.Errorf("destination %v: %d bytes are wrong", dst, bad)
	}
	if bad := p.Check(src, 0).Value(); bad != 0 {
		t.Errorf("source %v: %d bytes are not 0 after the move", src, bad)
	}
	quiet(t, f)
}

// moveRest goes on where the kernel has not counted what it moved.
func moveRest(t *testing.T, p *uffdtest.Process, f *uffd.File, dst, src uffd.Range, done uint64) (uint64, error) {
	t.Helper()
	size := uint64(uffdtest.Anon.PageSize())
	for {
		before := done
		for done < src.Len && p.Pagemap(dst.Start+uffd.Addr(done))&uffdtest.PagemapPresent != 0 {
			done += size
		}
		t.Logf("%d bytes are moved, %d were counted", done, before)
		if done == src.Len {
			return done, f.Wake(dst)
		}
		n, err := p.Move(dst.Start+uffd.Addr(done), src.Skip(int64(done)), 0).Result()
		if len(n) == 1 {
			done += n[0]
		}
		if err == nil {
			return done, f.Wake(dst)
		}
		if err != unix.EEXIST && err != unix.EAGAIN || before == done {
			return done, err
		}
	}
}

func TestMove(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureMove)
	p := uffdtest.Start(t)
	dst, src := p.Map(uffdtest.Anon, 8), p.Map(uffdtest.Anon, 8)
	f := p.Open(&uffd.Config{Require: uffd.FeatureMove})
	register(t, f, dst.Range, uffd.RegisterMissing)
	for i := range src.Pages() {
		p.Fill(src.Page(i), byte(1+i)).Value()
	}
	for i := range src.Pages() {
		moveChunk(t, p, f, dst.Page(i), src.Page(i), byte(1+i))
	}
}

func TestMovePMD(t *testing.T) { testMovePMD(t, unix.MADV_HUGEPAGE) }

// TestMovePMDSplit has the huge pages of the source be split, for the
// destination may not have any.
func TestMovePMDSplit(t *testing.T) { testMovePMD(t, unix.MADV_NOHUGEPAGE) }

func testMovePMD(t *testing.T, dstAdvice int) {
	uffdtest.Require(t, uffd.FeatureMove)
	thp := uffdtest.RequireTHP(t)
	p := uffdtest.Start(t)
	pages := int(2*thp) / uffdtest.Anon.PageSize()
	dst, src := aligned(p.Map(uffdtest.Anon, pages), thp), aligned(p.Map(uffdtest.Anon, pages), thp)
	p.Madvise(dst.Range, dstAdvice).Value()
	p.Madvise(src.Range, unix.MADV_HUGEPAGE).Value()
	f := p.Open(&uffd.Config{Require: uffd.FeatureMove})
	register(t, f, dst.Range, uffd.RegisterMissing)
	p.Fill(src.Range, 3).Value()
	if n := p.Smaps(src.Start, "AnonHugePages"); n != thp {
		t.Fatalf("the source has %d bytes of huge pages, want %d", n, thp)
	}
	if dstAdvice == unix.MADV_HUGEPAGE {
		moveChunk(t, p, f, dst.Range, src.Range, 3)
		if n := p.Smaps(dst.Start, "AnonHugePages"); n != thp {
			t.Errorf("the destination has %d bytes of huge pages, want %d", n, thp)
		}
		return
	}
	p.Madvise(src.Range, unix.MADV_NOHUGEPAGE).Value() // or the kernel may make it huge again
	half := uffd.Range{Start: src.Start, Len: thp / 2} // cannot stay huge
	moveChunk(t, p, f, uffd.Range{Start: dst.Start, Len: thp / 2}, half, 3)
	if n := p.Smaps(src.Start, "AnonHugePages"); n != 0 {
		t.Errorf("the source has %d bytes of huge pages, want none", n)
	}
	moveChunk(t, p, f, uffd.Range{Start: dst.Start + uffd.Addr(thp/2), Len: thp / 2},
		uffd.Range{Start: src.Start + uffd.Addr(thp/2), Len: thp / 2}, 3)
	if n := p.Smaps(dst.Start, "AnonHugePages"); n != 0 {
		t.Errorf("the destination has %d bytes of huge pages", n)
	}
}

func TestMoveErrors(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureMove)
	p := uffdtest.Start(t)
	dst, src := p.Map(uffdtest.Anon, 4), p.Map(uffdtest.Anon, 4)
	shared := p.Map(uffdtest.Shmem, 4)
	f := p.Open(&uffd.Config{Require: uffd.FeatureMove})
	register(t, f, dst.Range, uffd.RegisterMissing)
	register(t, f, shared.Range, uffd.RegisterMissing)
	want := func(what string, c *uffdtest.Call, wantN uint64, wantErr error) {
		t.Helper()
		v, err := c.Result()
		if len(v) != 1 || v[0] != wantN || err != wantErr {
			t.Errorf("%s: %d, %v; want %d, %v", what, v, err, wantN, wantErr)
		}
	}
	size := dst.Page(0).Len
	want("hole", p.Move(dst.Start, src.Page(0), 0), 0, unix.ENOENT)
	p.Fill(src.Page(0), 1).Value()
	p.Fill(src.Page(1), 2).Value()
	p.Fill(src.Page(3), 4).Value()
	want("to memory that is not registered", p.Move(src.Page(2).Start, src.Page(0), 0), 0, unix.EINVAL)
	want("to shared memory", p.Move(shared.Start, src.Page(0), 0), 0, unix.EINVAL)
	n, err := f.Move(dst.Start, src.Page(0), 0)
	wantErr(t, "Move in another process", n, err, unix.EINVAL)

	// Two pages, then a hole.
	want("up to the hole", p.Move(dst.Start, src.Range, 0), 2*size, unix.EAGAIN)
	want("at the hole", p.Move(dst.Page(2).Start, src.Range.Skip(int64(2*size)), 0), 0, unix.ENOENT)
	want("over the hole", p.Move(dst.Page(2).Start, src.Range.Skip(int64(2*size)), uffd.MoveAllowSrcHoles), 2*size, nil)
	for i, b := range []uint64{1, 2, 77, 4} {
		load := p.Load(dst.Page(i).Start)
		if i == 2 { // still missing
			nextFault(t, f, dst.Page(i), 0)
			fill(t, f, dst.Kind, dst.Page(i), 77, 0)
		}
		if v := load.Value(); v != b {
			t.Errorf("page %d reads %d, want %d", i, v, b)
		}
	}
	p.Fill(src.Page(0), 5).Value()
	want("to a page that is there", p.Move(dst.Start, src.Page(0), 0), 0, unix.EEXIST)

	// A page shared with a forked child stays until it is written.
	p.Madvise(dst.Page(0), unix.MADV_DONTNEED).Value()
	forked := p.Fork(uffdtest.Step{Op: uffdtest.StepGate})
	p.AwaitForks()
	want("shared with a child", p.Move(dst.Start, src.Page(0), 0), 0, unix.EBUSY)
	p.OpenGate()
	forked.Value()
	p.Fill(src.Page(0), 6).Value()
	load := p.Load(dst.Start)
	nextFault(t, f, dst.Page(0), 0)
	want("written since", p.Move(dst.Start, src.Page(0), uffd.MoveDontWake), size, nil)
	if n := waiting(t, f); n != 1 {
		t.Errorf("%d threads wait after MoveDontWake, want 1", n)
	}
	if err := f.Wake(dst.Page(0)); err != nil {
		t.Fatal(err)
	}
	if b := load.Value(); b != 6 {
		t.Errorf("loaded %d, want 6", b)
	}
}
