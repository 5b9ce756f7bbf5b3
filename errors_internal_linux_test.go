package uffd

import (
	"errors"
	"math"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What the kernel puts into the out field counts only where it says so.
func TestDone(t *testing.T) {
	const page = 4096
	for _, c := range []struct {
		errno unix.Errno
		out   int64
		want  int64
	}{
		{0, 3 * page, 3 * page},
		{unix.EAGAIN, 2 * page, 2 * page},
		{unix.EAGAIN, 0, 0}, // as older kernels leave it
		{unix.EAGAIN, -int64(unix.EAGAIN), 0},
		{unix.EAGAIN, math.MinInt64, 0},
		{unix.EEXIST, -int64(unix.EEXIST), 0},
		{unix.EINVAL, 5 * page, 0}, // never written: what it was before
		{unix.ESRCH, 5 * page, 0},
		{unix.EFAULT, 5 * page, 0},
	} {
		n, err := done(opCopy, c.errno, c.out)
		if n != c.want || (c.errno == 0) != (err == nil) || err != nil && !errors.Is(err, c.errno) {
			t.Errorf("%v with %d: %d, %v; want %d", c.errno, c.out, n, err, c.want)
		}
	}
}

func TestErrnoErrors(t *testing.T) {
	for _, c := range []struct {
		op     op
		errno  unix.Errno
		target error
		want   bool
	}{
		{opCopy, unix.EAGAIN, ErrRetry, true},
		{opWriteProtect, unix.EAGAIN, ErrRetry, true},
		{opCopy, unix.ESRCH, ErrGone, true},
		{opCopy, unix.ENOSPC, ErrGone, true}, // Linux 4.11
		{opZeroPage, unix.ENOSPC, ErrGone, true},
		{opRegister, unix.ENOSPC, ErrGone, false},
		{opRegister, unix.ENOMEM, ErrGone, false},
		{opCopy, unix.ENOENT, ErrGone, false},
		{opCopy, unix.EEXIST, os.ErrExist, true},
		{opCopy, unix.EEXIST, ErrRetry, false},
		{opRegister, unix.EPERM, os.ErrPermission, true},
		{opCopy, unix.EHWPOISON, unix.EHWPOISON, true}, // above those that are made in advance
		{opPopulate, unix.ENOSYS, errors.ErrUnsupported, true},
	} {
		if got := errors.Is(errnoError(c.op, c.errno), c.target); got != c.want {
			t.Errorf("%s: %v is %v: %v", opNames[c.op], c.errno, c.target, got)
		}
	}
}

func TestRemedy(t *testing.T) {
	for _, errno := range []unix.Errno{unix.ENOSYS, unix.EINVAL, unix.EMFILE, unix.ENFILE, unix.EPERM, unix.EACCES} {
		for _, faults := range []Faults{BestFaults, AllFaults, UserFaults} {
			failed := &OpenError{Attempts: []OpenAttempt{{"userfaultfd(0)", errno}}}
			if remedy(failed, faults) == "" {
				t.Errorf("%v with %v: no remedy", errno, faults)
			}
		}
	}
}

// A call that has passed the first look at the state, and gets its turn only after
// Close, must not use the descriptor.
func TestBeginAfterClose(t *testing.T) {
	f, err := New(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.joinPoller(opReadMsg); err != nil {
		t.Fatal(err)
	}
	f.calls.Lock()
	result := make(chan error, 100)
	for range cap(result) {
		go func() { result <- f.Wake(Range{Addr(pageMask + 1), pageMask + 1}) }()
	}
	time.Sleep(10 * time.Millisecond) // they wait for their turn
	f.state.Store(stateClosed)
	f.calls.Unlock()
	for range cap(result) {
		if err := <-result; !errors.Is(err, os.ErrClosed) {
			t.Errorf("got %v, want ErrClosed", err)
		}
	}
	f.close()
	polled.Lock()
	defer polled.Unlock()
	if _, kept := polled.files[f.poller.Load().file]; kept {
		t.Error("the closed file is kept")
	}
}

// A deadline counts from now on, and does not wrap round.
func TestDeadlineAt(t *testing.T) {
	for _, c := range []struct {
		now, left time.Duration
		want      int64
	}{
		{5, 10, 15},
		{5, -3, 2},
		{5, -10, 1}, // 0 is none
		{5, math.MinInt64, 1},
		{5, math.MaxInt64, math.MaxInt64},
		{math.MaxInt64 / 2, math.MaxInt64, math.MaxInt64},
	} {
		if got := deadlineAt(c.now, c.left); got != c.want {
			t.Errorf("at %d, %d left: %d, want %d", c.now, c.left, got, c.want)
		}
	}
	var d deadline
	for _, past := range []time.Time{time.Now().Add(-time.Hour), time.Now().Round(0).Add(-time.Hour), {}} {
		d.set(past)
		if over := d.over(); over == past.IsZero() {
			t.Errorf("the deadline %v is over: %t", past, over)
		}
	}
}
