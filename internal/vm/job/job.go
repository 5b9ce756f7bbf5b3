// Package job is what the two halves of the kernel runner say to each other:
// the host puts a [Job] into the guest's initramfs, and the guest's PID 1
// answers with [Event]s on the console.
package job

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"time"
)

// Path is where PID 1 finds its Job.
const Path = "/job.json"

// A Job is everything PID 1 is to do.
type Job struct {
	// Nonce marks the events on the console, so that no output of a program
	// can be taken for one.
	Nonce string

	// Sysctls are written below /proc/sys before the first program, in order.
	Sysctls []Sysctl

	// HugePages is the number of huge pages of the default size to reserve.
	HugePages int

	Programs []Program
}

// A Sysctl is a kernel parameter such as {"vm.overcommit_memory", "1"}.
type Sysctl struct{ Name, Value string }

// A Program is one command to run in the guest.
type Program struct {
	Path string
	Args []string // without the program's name
	Env  []string
	Dir  string

	// UID is the user and group to run as.
	UID int

	// Limit ends the program: SIGQUIT, and a little later SIGKILL.
	Limit time.Duration

	// Outputs are files and folders to send back when the program has ended.
	// What does not exist then is left out.
	Outputs []string
}

// An Event is one message from PID 1. Exactly one field is set.
type Event struct {
	Boot  *Boot  `json:",omitempty"`
	Start *Start `json:",omitempty"`
	Exit  *Exit  `json:",omitempty"`
	File  *File  `json:",omitempty"`

	// Error says that PID 1 could not do its job. No further event follows.
	Error string `json:",omitempty"`

	// Done is the marker: everything has been run and reported.
	Done bool `json:",omitempty"`
}

// Boot tells what was booted.
type Boot struct {
	Release  string // uname -r
	Machine  string // uname -m
	PageSize int

	// Features is the mask that UFFDIO_API offers. UffdError says why there
	// is none.
	Features  uint64
	UffdError string `json:",omitempty"`
}

// Start precedes the output of the program with this index.
type Start struct{ Program int }

// Exit follows the output of a program.
type Exit struct {
	Program  int
	Code     int // 128 + signal number for a program that a signal ended
	TimedOut bool
	Elapsed  time.Duration

	// KernelLog is the kernel's log from the first warning, bug or oops that
	// happened during the program. It is empty when all went well.
	KernelLog []string `json:",omitempty"`
}

// A File is one output of the program that has just ended.
type File struct {
	Path string
	Data []byte
}

func prefix(nonce string) string { return "<vm " + nonce + " " }

const suffix = ">"

// Encode returns e as it goes over the console, line end included.
func Encode(nonce string, e Event) ([]byte, error) {
	data, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	b := []byte(prefix(nonce))
	b = base64.StdEncoding.AppendEncode(b, data)
	return append(b, suffix+"\n"...), nil
}

// Decode splits a line of the console into the output before the event and
// the event. Without an event in it the whole line is output.
func Decode(nonce string, line []byte) (output []byte, e *Event, err error) {
	output, rest, ok := bytes.Cut(line, []byte(prefix(nonce)))
	if !ok {
		return line, nil, nil
	}
	data, _, ok := bytes.Cut(rest, []byte(suffix))
	if !ok {
		return output, nil, fmt.Errorf("event cut short: %q", rest)
	}
	data, err = base64.StdEncoding.AppendDecode(nil, data)
	if err != nil {
		return output, nil, fmt.Errorf("event: %w", err)
	}
	e = new(Event)
	if err := json.Unmarshal(data, e); err != nil {
		return output, nil, fmt.Errorf("event: %w", err)
	}
	return output, e, nil
}
