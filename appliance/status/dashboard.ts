/** The page at `/`: one file, no build step, nothing from elsewhere; it reads `/v1/status` of its own daemon. */
export const DASHBOARD = `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>Detour</title>
<style>
:root{color-scheme:light dark;font:15px/1.45 system-ui,sans-serif}
body{margin:1.5rem auto;max-width:72rem;padding:0 1rem}
h1{font-size:1.3rem;margin:0}h2{font-size:1rem;margin:1.6rem 0 .4rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.25rem .75rem .25rem 0;border-bottom:1px solid #8884;vertical-align:top}
th{font-weight:600;opacity:.7}.wrap{overflow-x:auto}
.bad{color:#c62828}.good{color:#2e7d32}#state{margin:.2rem 0}
</style>
<h1>Detour <span id="what"></span></h1>
<p id="state">reading&hellip;</p>
<div id="tables"></div>
<script>
const make=(tag,text,cls)=>{const e=document.createElement(tag);if(text!==undefined)e.textContent=text;if(cls)e.className=cls;return e};
const isRows=v=>Array.isArray(v)&&v.every(r=>r&&typeof r==='object');
const show=v=>v===null||v===undefined?'':Array.isArray(v)?v.map(show).join(', '):typeof v==='object'?Object.entries(v).map(([k,w])=>k+': '+(show(w)||'-')).join(', '):String(v);
function table(name,rows){
  const box=make('section');box.append(make('h2',name+' ('+rows.length+')'));
  const plain=rows.slice(0,500);
  const columns=[...new Set(plain.flatMap(r=>Object.keys(r).filter(k=>!Array.isArray(r[k]))))];
  if(!plain.length)return box;
  const wrap=make('div',undefined,'wrap'),t=make('table'),head=make('tr');
  for(const c of columns)head.append(make('th',c));
  t.append(head);
  for(const r of plain){const tr=make('tr');for(const c of columns)tr.append(make('td',show(r[c])));t.append(tr)}
  wrap.append(t);box.append(wrap);return box}
async function read(){
  const state=document.getElementById('state');
  try{
    const s=await(await fetch('v1/status',{cache:'no-store'})).json();
    document.getElementById('what').textContent=(s.role||'')+' '+(s.version||'');
    state.textContent=s.ready?'ready':'not ready: '+(s.reasons||[]).join('; ');
    state.className=s.ready?'good':'bad';
    const out=[];
    const facts=make('table');
    for(const[k,v]of Object.entries(s))if(!isRows(v)&&!['role','version','ready','reasons'].includes(k)){
      const tr=make('tr');tr.append(make('th',k),make('td',show(v)));facts.append(tr)}
    out.push(facts);
    for(const[k,v]of Object.entries(s))if(isRows(v)&&k!=='reasons'){
      out.push(table(k,v));
      const paths=v.flatMap(r=>r&&Array.isArray(r.paths)?r.paths.map(p=>({connection:r.token,...p})):[]);
      if(paths.length)out.push(table('paths',paths))}
    document.getElementById('tables').replaceChildren(...out)
  }catch(e){state.textContent='the daemon does not answer';state.className='bad'}
  setTimeout(read,2000)}
read();
</script>
</html>
`;
