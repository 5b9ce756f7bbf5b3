//go:build !linux

package uffd

import "os"

// supported is whether the system has userfaultfd.
const supported = false

func open(Faults) (*File, error) {
	return nil, &OpenError{Attempts: []OpenAttempt{{"userfaultfd(2)", refusals[refusalUnsupported]}}}
}

func openDevice(*os.File, Faults) (*File, error) { return open(AllFaults) }

func fromFD(int) (*File, error) { return nil, refusalUnsupported.error(opFromFD) }

func populate([]byte, bool) error { return refusalUnsupported.error(opPopulate) }

// Request returns false: there are no request numbers outside of Linux.
func (s Ioctls) Request() (uint32, bool) { return 0, false }

// The methods of File do not get as far as these.

func (f *File) api(Features) (Features, Ioctls, error) {
	return 0, 0, refusalUnsupported.error(opAPI)
}
func (f *File) startPolling(op op) (*poller, error) {
	return nil, refusalUnsupported.error(op)
}
func (f *File) adopt(op op, _ Features) error { return refusalUnsupported.error(op) }
func (f *File) close() error                  { return refusalUnsupported.error(opClose) }

func (f *File) register(Range, RegisterMode) (Ioctls, error) {
	return 0, refusalUnsupported.error(opRegister)
}
func (f *File) unregister(Range) error { return refusalUnsupported.error(opUnregister) }
func (f *File) wake(Range) error       { return refusalUnsupported.error(opWake) }

func (f *File) copyPages(Addr, []byte, CopyMode) (int64, error) {
	return 0, refusalUnsupported.error(opCopy)
}
func (f *File) zeroPage(Range, ZeroPageMode) (int64, error) {
	return 0, refusalUnsupported.error(opZeroPage)
}
func (f *File) mapPages(Range, ContinueMode) (int64, error) {
	return 0, refusalUnsupported.error(opContinue)
}
func (f *File) poison(Range, PoisonMode) (int64, error) {
	return 0, refusalUnsupported.error(opPoison)
}
func (f *File) move(Addr, Range, MoveMode) (int64, error) {
	return 0, refusalUnsupported.error(opMove)
}
func (f *File) writeProtect(Range, WriteProtectMode) error {
	return refusalUnsupported.error(opWriteProtect)
}
func (f *File) rwProtect(Range, RWProtectMode) error { return refusalUnsupported.error(opRWProtect) }
func (f *File) setMode(Features, Features) error     { return refusalUnsupported.error(opSetMode) }
func (f *File) readMsgs([]Msg) (int, error)          { return 0, refusalUnsupported.error(opReadMsg) }

type reader struct{}

func newReader() *reader { return nil }

type rawConn struct{ *File }

func (rawConn) Control(func(uintptr)) error    { return refusalUnsupported.error(opSyscallConn) }
func (rawConn) Read(func(uintptr) bool) error  { return refusalUnsupported.error(opSyscallConn) }
func (rawConn) Write(func(uintptr) bool) error { return refusalUnsupported.error(opSyscallConn) }
