//go:build !linux

package lazymem

import (
	"errors"
	"fmt"
	"os"
	"unsafe"
)

var errUnsupported = fmt.Errorf("lazymem: userfaultfd exists on Linux only: %w", errors.ErrUnsupported)

func (m *Memory) open(bool) error        { return errUnsupported }
func (m *Memory) unmap() error           { return errUnsupported }
func (m *Memory) discard([]byte) error   { return errUnsupported }
func (m *Memory) dup() (*os.File, error) { return nil, errUnsupported }
func getg() unsafe.Pointer               { return nil }
func lastFault() *uintptr                { return new(uintptr) }
