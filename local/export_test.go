package local

// Keep gives p a folder, as a Stack does.
func (p *Provider) Keep(dir string) (closed func(), err error) {
	if p.store, err = openStore(dir); err != nil {
		return nil, err
	}
	return p.store.close, p.restore()
}
