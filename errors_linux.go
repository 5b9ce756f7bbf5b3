package uffd

import "golang.org/x/sys/unix"

// hints say in words what an errno of a call means.
var hints = [...]struct {
	ops  []op
	err  unix.Errno
	text string
}{
	{[]op{opAPI}, unix.EPERM, "FeatureEventFork needs CAP_SYS_PTRACE in the initial user namespace"},
	{[]op{opAPI}, unix.EINVAL, "the kernel refuses these features together (FeatureRWPAsync needs FeatureRWP), or the descriptor has been through API before"},
	{[]op{opRegister}, unix.EINVAL, "nothing is mapped in the range, or its memory does not support these modes, or the modes exclude one another"},
	{[]op{opRegister}, unix.EPERM, "the range is a shared mapping of a file that may not be written"},
	{[]op{opRegister}, unix.EBUSY, "the memory is registered with another userfaultfd, or WP or RWP would be dropped: Unregister first"},
	{[]op{opUnregister}, unix.EINVAL, "nothing is mapped in the range, or its memory does not support userfaultfd or is registered with another one"},
	{[]op{opRegister, opUnregister}, unix.ENOMEM, "the process has exited, or has too many mappings (vm.max_map_count)"},
	{[]op{opCopy, opZeroPage, opContinue, opPoison, opMove}, unix.EAGAIN, "stopped part-way, or an event waits to be read"},
	{[]op{opWriteProtect, opRWProtect}, unix.EAGAIN, "an event waits to be read"},
	{[]op{opCopy, opZeroPage, opPoison}, unix.EEXIST, "a page is there already; no thread was woken"},
	{[]op{opContinue}, unix.EEXIST, "the page is mapped already; no thread was woken"},
	{[]op{opMove}, unix.EEXIST, "the destination has a page already; no thread was woken"},
	{[]op{opCopy, opZeroPage, opContinue, opPoison}, unix.ENOENT, "the range does not lie within one registered mapping"},
	{[]op{opMove}, unix.ENOENT, "the source has no page there, or a range is not mapped"},
	{[]op{opWriteProtect}, unix.ENOENT, "part of the range is not registered with RegisterWP; what comes before it has been changed"},
	{[]op{opRWProtect}, unix.ENOENT, "part of the range is not registered with RegisterRWP; nothing has been changed"},
	{[]op{opCopy}, unix.EFAULT, "the source cannot be read, or the destination lies past the end of its file"},
	{[]op{opZeroPage, opPoison}, unix.EFAULT, "the range lies past the end of its file"},
	{[]op{opContinue}, unix.EFAULT, "the file has no page there"},
	{[]op{opMove}, unix.EFAULT, "the source is a poisoned or otherwise marked page"},
	{[]op{opCopy}, unix.EINVAL, "a huge page cut short, or CopyWP without RegisterWP, or the source lies above a 32-bit process's addresses"},
	{[]op{opZeroPage}, unix.EINVAL, "hugetlb memory has no zero page: use Copy"},
	{[]op{opContinue}, unix.EINVAL, "the memory is private and anonymous, or lies past the end of its file, or a huge page is cut short, or ContinueWP without RegisterWP"},
	{[]op{opPoison}, unix.EINVAL, "the kernel cannot poison, or a huge page is cut short"},
	{[]op{opMove}, unix.EINVAL, "the kernel cannot move pages, or the ranges are not one mapping each of alike private anonymous memory of the calling process"},
	{[]op{opWriteProtect, opRWProtect}, unix.EINVAL, "the kernel cannot protect, or a huge page is cut short, or the modes exclude one another"},
	{[]op{opMove}, unix.EBUSY, "a source page is pinned, merged or shared with a forked child"},
	{[]op{opCopy, opZeroPage, opContinue}, unix.ENOMEM, "out of memory, or the file system or control group is at its limit"},
	{[]op{opCopy, opZeroPage, opContinue, opPoison, opWriteProtect, opRWProtect}, unix.ESRCH, "the process has exited"},
	{[]op{opCopy, opZeroPage}, unix.ENOSPC, "the process has exited"},
	{[]op{opSetMode}, unix.EINVAL, "only FeatureRWPAsync can be switched, after FeatureRWP was enabled"},
	{[]op{opReadMsg}, unix.EMFILE, "no free descriptor to receive a fork event's; the event stays queued and the child waits"},
	{[]op{opPopulate}, unix.EFAULT, "the fault cannot be served: the userfaultfd takes user faults only, or raises SIGBUS, or the page is protected"},
	{[]op{opPopulate}, unix.ENOMEM, "part of the range is not mapped"},
}

// errnos that userfaultfd calls return lie below this.
const errnoCount = 40

// errnoErrors has an Error for each op and errno, so that none is allocated.
var errnoErrors = func() (table [opCount][errnoCount]Error) {
	for op := range table {
		for e := range table[op] {
			table[op][e] = Error{Op: opNames[op], Err: reasonFor(unix.Errno(e), "")}
		}
	}
	for _, h := range hints {
		for _, op := range h.ops {
			table[op][h.err].Err = reasonFor(h.err, h.text)
		}
	}
	return table
}()

func reasonFor(e unix.Errno, text string) error {
	switch {
	case e == unix.EAGAIN:
		return &reason{text, e, ErrRetry}
	case e == unix.ESRCH, e == unix.ENOSPC && text != "":
		return &reason{text, e, ErrGone}
	case text != "":
		return &reason{text, e, nil}
	}
	return e
}

// errnoError is the Error of an op that the kernel refused.
func errnoError(op op, e unix.Errno) error {
	if e < errnoCount {
		return &errnoErrors[op][e]
	}
	return &Error{Op: opNames[op], Err: e}
}
