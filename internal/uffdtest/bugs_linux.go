package uffdtest

import (
	"runtime"
	"slices"
	"strings"
	"testing"
)

// A Bug is an error of some kernels that tests make way for. All of them are in
// this file, and TestKnownBugs asserts that each is where its Here says, and
// nowhere else.
type Bug struct {
	What string
	Here func() bool // the running kernel has it

	// Fatal says that showing the bug takes the kernel down, or leaves a process
	// that nobody can end; Rare that it shows by chance. Neither is asserted.
	Fatal, Rare bool
}

var (
	// FalseWP: the bit is offered, REGISTER and WRITEPROTECT succeed.
	FalseWP = &Bug{
		What: "write protection that is offered and never reports a fault",
		Here: func() bool { return kernelIn("5.7", "5.13") && Machine() != "x86_64" },
	}
	// FalseAPI: other kernels answer EINVAL.
	FalseAPI = &Bug{
		What: "UFFDIO_API accepts write protection without offering it",
		Here: func() bool { return kernelIn("6.5", "6.6") && machineIs("i686", "i386") },
	}
	// PageForExact: gone by 6.12, the next kernel that was tried.
	PageForExact = &Bug{
		What: "EXACT_ADDRESS is offered, and faults have the address of the page",
		Here: func() bool { return kernelIn("5.18", "6.12") && runtime.GOARCH == "arm" },
	}
	// ForkedWPHugetlb: with FeatureEventFork now and then.
	ForkedWPHugetlb = &Bug{
		What: "a forked child that writes to write-protected private hugetlb memory faults for ever",
		Here: func() bool { return kernelIn("5.19", "6.4") && Machine() == "x86_64" },

		Fatal: true,
	}
	MoveOnShmem = &Bug{
		What: "REGISTER offers MOVE for shared memory, where it always fails",
		Here: func() bool { return kernelIn("6.8", "") },
	}
	SetModeWithoutRWP = &Bug{
		What: "API offers SET_MODE where there is no mode to set",
		Here: func() bool { return kernelIn("7.3", "") && !machineIs("x86_64", "aarch64") },
	}
	// LostWaiter: the wake comes before the mappings are locked.
	LostWaiter = &Bug{
		What: "UNREGISTER forgets a thread that faults at the same moment",
		Here: func() bool { return kernelIn("6.6", "") },
		Rare: true,
	}
	// UncountedMove: once the kernel had to try again, as when another holds the
	// lock of a huge page, it does not count what it moves next, and moves it
	// again. Seen on 7.0; it came with moving in batches.
	UncountedMove = &Bug{
		What: "MOVE says EEXIST of pages that it has just moved",
		Here: func() bool { return kernelIn("6.18", "") },
		Rare: true,
	}
	PoisonBug = &Bug{
		What:  "an access to a poisoned page is a BUG",
		Here:  func() bool { return kernelIn("6.6", "") && strings.HasPrefix(runtime.GOARCH, "mips") },
		Fatal: true,
	}
	PoisonHugetlb = &Bug{
		What:  "a poisoned page of hugetlb memory is an Oops",
		Here:  func() bool { return kernelIn("6.6", "") && runtime.GOARCH == "arm" },
		Fatal: true,
	}
	HugetlbUnmap = &Bug{
		What:  "unmapping hugetlb memory is a BUG",
		Here:  func() bool { return kernelIn("7.0", "") && runtime.GOARCH == "arm" },
		Fatal: true,
	}
	Bugs = []*Bug{FalseWP, FalseAPI, PageForExact, ForkedWPHugetlb, MoveOnShmem, SetModeWithoutRWP, LostWaiter, UncountedMove, PoisonBug, PoisonHugetlb, HugetlbUnmap}
)

// Avoid skips t on kernels that have the bug.
func (b *Bug) Avoid(t testing.TB) {
	t.Helper()
	if !slices.Contains(Bugs, b) {
		t.Fatalf("not in the list, so nothing asserts it: %s", b.What)
	}
	if b.Here() {
		skip(t, "a kernel without this bug: %s", b.What)
	}
}

// kernelIn reports whether the running kernel is of a version from first on and
// before end, which may be "".
func kernelIn(first, end string) bool {
	major, minor := Kernel()
	return atLeast(major, minor, first) && (end == "" || !atLeast(major, minor, end))
}

func machineIs(names ...string) bool { return slices.Contains(names, Machine()) }
