//go:build !linux

package pager

import (
	"errors"
	"os"
)

// No userfaultfd can be opened here, so none of this is called.

func (c *Client) readable() bool { return true }

func waitHangup(Peer) bool { return false }

func closeFD(int) {}

// OpenPid returns a pidfd of a process, for [Client.Watch]. Only Linux has them.
func OpenPid(pid int) (*os.File, error) { return nil, errors.ErrUnsupported }

func discard([]byte) error { return errors.ErrUnsupported }
