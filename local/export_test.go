package local

import "github.com/nats-io/nats.go"

// Keep gives p a folder, as a Stack does.
func (p *Provider) Keep(dir string) (closed func(), err error) {
	if p.store, err = openStore(dir); err != nil {
		return nil, err
	}
	return p.store.close, p.restore()
}

// Roles are those of the stack's NATS.
func Roles() (names []string) {
	for _, r := range roles {
		names = append(names, r.name)
	}
	return names
}

// As connects to the stack's NATS as a role, over the network.
func (s *Stack) As(role string) (*nats.Conn, error) {
	if role == roleClient {
		return nats.Connect(s.ClientURL())
	}
	o, err := s.logins.options(role)
	if err != nil {
		return nil, err
	}
	return nats.Connect(s.NATS, o...)
}
