package uffd

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// Error is a failed call of a [File]'s method, or of [Populate].
//
// Unwrapping gives the reason in words, then the errno. [errors.Is] works with
// the errno (unix.EEXIST), with [fs.ErrExist], [fs.ErrPermission],
// [errors.ErrUnsupported], [os.ErrClosed] and [os.ErrDeadlineExceeded], and
// with [ErrRetry] and [ErrGone].
//
// Errors of the calls that serve faults are made once, when the program
// starts: to fail does not allocate.
type Error struct {
	Op  string // the method, like "Copy"
	Err error  // why it failed
}

func (e *Error) Error() string { return "uffd: " + e.Op + ": " + e.Err.Error() }

// Unwrap returns the reason.
func (e *Error) Unwrap() error { return e.Err }

// ErrRetry matches EAGAIN: the call stopped before its end and will go on.
//
// If it returned n > 0, n bytes are done: call again for the rest, with
// [Range.Skip], and learn why it stopped, or finish. If n is 0, an event waits
// to be read: read messages until none is left, then call again. Rarely the
// kernel says so without an event, so try again after a short while too.
var ErrRetry = errors.New("uffd: try again")

// ErrGone matches what a call says when the process that owns the memory has
// exited or called execve(2): ESRCH (ENOSPC on Linux 4.11 and 4.12). Register
// and Unregister say ENOMEM instead, which has other causes too and is not
// matched.
var ErrGone = errors.New("uffd: process is gone")

// A reason is an errno in words. It is what Error.Err holds.
type reason struct {
	text string
	err  error
	kind error // ErrRetry, ErrGone or nil
}

func (r *reason) Error() string {
	if r.text == "" {
		return r.err.Error()
	}
	return r.text + ": " + r.err.Error()
}

func (r *reason) Unwrap() error        { return r.err }
func (r *reason) Is(target error) bool { return r.kind != nil && r.kind == target }

// An op is a method that can fail.
type op uint8

const (
	opAPI op = iota
	opRegister
	opUnregister
	opWake
	opCopy
	opZeroPage
	opContinue
	opPoison
	opMove
	opWriteProtect
	opRWProtect
	opSetMode
	opReadMsg
	opSetReadDeadline
	opSyscallConn
	opClose
	opFromFD
	opChild
	opOpenDevice
	opPopulate
	opCount
)

var opNames = [opCount]string{
	"API", "Register", "Unregister", "Wake", "Copy", "ZeroPage", "Continue", "Poison", "Move",
	"WriteProtect", "RWProtect", "SetMode", "ReadMsg", "SetReadDeadline", "SyscallConn", "Close",
	"FromFD", "Child", "OpenDevice", "Populate",
}

// A refusal is a failure that is not the kernel's.
type refusal uint8

const (
	refusalNone refusal = iota
	refusalClosed
	refusalDeadline
	refusalInvalid
	refusalNoAPI
	refusalSecondAPI
	refusalEmpty
	refusalStart
	refusalLength
	refusalOverflow
	refusalMoveDst
	refusalMoveOverflow
	refusalNoBuffer
	refusalNotFork
	refusalUnsupported
	refusalCount
)

var refusals = [refusalCount]error{
	refusalClosed:       os.ErrClosed,
	refusalDeadline:     os.ErrDeadlineExceeded,
	refusalInvalid:      os.ErrInvalid,
	refusalNoAPI:        &reason{text: "call API first", err: syscall.EINVAL},
	refusalSecondAPI:    &reason{text: "API has succeeded on this File before; open another", err: syscall.EINVAL},
	refusalEmpty:        &reason{text: "the range is empty", err: syscall.EINVAL},
	refusalStart:        &reason{text: "the address is not a multiple of the page size", err: syscall.EINVAL},
	refusalLength:       &reason{text: "the length is not a multiple of the page size", err: syscall.EINVAL},
	refusalOverflow:     &reason{text: "the range runs past the end of the address space", err: syscall.EINVAL},
	refusalMoveDst:      &reason{text: "the destination is not a multiple of the page size", err: syscall.EINVAL},
	refusalMoveOverflow: &reason{text: "the destination runs past the end of the address space", err: syscall.EINVAL},
	refusalNoBuffer:     &reason{text: "no room for a message", err: syscall.EINVAL},
	refusalNotFork:      &reason{text: "the message is not a fork event with a descriptor still to adopt", err: syscall.EINVAL},
	refusalUnsupported:  &reason{text: "userfaultfd exists on Linux only", err: errors.ErrUnsupported},
}

// refusalErrors has an Error for each of them and each op, so that none is allocated.
var refusalErrors = func() (table [opCount][refusalCount]Error) {
	for op := range table {
		for r := range table[op] {
			table[op][r] = Error{Op: opNames[op], Err: refusals[r]}
		}
	}
	return table
}()

func (r refusal) error(op op) error { return &refusalErrors[op][r] }

// FeatureError says that the kernel does not offer features that were asked
// for. It is [errors.ErrUnsupported].
type FeatureError struct {
	Missing Features // asked for and not offered
	Offered Features // what the kernel offers
}

func (e *FeatureError) Error() string {
	var list []string
	for _, f := range sets[featurePrefix] {
		if uint64(e.Missing)&f.bit != 0 {
			list = append(list, fmt.Sprintf("%s (Linux %v)", f.name, f.since))
		}
	}
	if unknown := e.Missing &^ knownFeatures(); unknown != 0 {
		list = append(list, unknown.String()+" (unknown)")
	}
	return fmt.Sprintf("uffd: the kernel does not offer %s; it offers %v", strings.Join(list, ", "), e.Offered)
}

// Is reports whether target is errors.ErrUnsupported.
func (e *FeatureError) Is(target error) bool { return target == errors.ErrUnsupported }

func knownFeatures() (all Features) {
	for _, f := range sets[featurePrefix] {
		all |= Features(f.bit)
	}
	return all
}

// OpenError says that no userfaultfd could be opened: every way that was
// tried, what each answered, and what would help.
//
// [errors.Is] follows what the system call said, or the device where only that
// was asked: [fs.ErrPermission] where the caller lacks permission,
// [errors.ErrUnsupported] where the kernel has no userfaultfd.
type OpenError struct {
	Attempts []OpenAttempt // in the order they were tried
	Remedy   string        // what would open a way, in a sentence
}

// OpenAttempt is one way to open a userfaultfd, and why it failed.
type OpenAttempt struct {
	Way string // like "/dev/userfaultfd" or "userfaultfd(UFFD_USER_MODE_ONLY)"
	Err error  // an errno, or what is wrong with the file that was given
}

func (e *OpenError) Error() string {
	var s strings.Builder
	s.WriteString("uffd: cannot open a userfaultfd: ")
	for i, a := range e.Attempts {
		if i > 0 {
			s.WriteString("; ")
		}
		fmt.Fprintf(&s, "%s: %v", a.Way, a.Err)
	}
	if e.Remedy != "" {
		s.WriteString(" (" + e.Remedy + ")")
	}
	return s.String()
}

// Unwrap returns what the last system call answered, or the device where only
// that was asked.
func (e *OpenError) Unwrap() error {
	for i := len(e.Attempts) - 1; i >= 0; i-- {
		if e.Attempts[i].Way != devicePath {
			return e.Attempts[i].Err
		}
	}
	if len(e.Attempts) > 0 {
		return e.Attempts[len(e.Attempts)-1].Err
	}
	return nil
}

const devicePath = "/dev/userfaultfd"
